"""A world small enough to train on in a second: topics with words of their own, users who stay in a topic."""

import numpy as np
import pyarrow as pa

TOPICS = 6
WORDS = ("lamp", "chair", "song", "film", "book", "shoe")


def items(count: int = 60) -> pa.Table:
    """item-000 ...; the topic of an item is its number modulo TOPICS, and stands in its text."""
    return pa.table(
        {
            "item_id": [f"item-{i:03d}" for i in range(count)],
            "title": [f"{WORDS[i % TOPICS]} number {i // TOPICS}" for i in range(count)],
            "text": [f"a fine {WORDS[i % TOPICS]} of make {i % 5}" for i in range(count)],
            "categories": [[WORDS[i % TOPICS]] for i in range(count)],
        }
    )


def histories(users: int = 90, count: int = 60, *, seed: int = 0, longest: int = 12) -> list[list[str]]:
    """Each user meets 3 to ``longest`` different items of one topic, in random order."""
    random = np.random.default_rng(seed)
    found = []
    for user in range(users):
        mine = np.arange(user % TOPICS, count, TOPICS)
        length = int(random.integers(3, min(longest, len(mine)) + 1))
        found.append([f"item-{i:03d}" for i in random.permutation(mine)[:length]])
    return found
