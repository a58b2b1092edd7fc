"""A data set whose next item follows from the last: users who walk through rings of ten items."""

import gzip
import json
from pathlib import Path

import numpy as np

RINGS, LENGTH = 4, 10
ITEMS = RINGS * LENGTH


def write_walks(place: Path, users: int, *, first_id: int = 0) -> None:
    """Make the folder ``place`` with sequences of ``users``, 5 to 9 steps each, and titles; ids from
    ``first_id`` on."""
    random = np.random.default_rng(0)
    place.mkdir()
    with gzip.open(place / "sequences.jsonl.gz", "wt") as out:
        for user in range(users):
            ring, start = user % RINGS, int(random.integers(LENGTH))
            steps = range(int(random.integers(5, 10)))
            walk = [first_id + ring * LENGTH + (start + step) % LENGTH for step in steps]
            out.write(json.dumps(walk) + "\n")
    with gzip.open(place / "items.jsonl.gz", "wt") as out:
        for item in range(ITEMS):
            out.write(json.dumps({"id": first_id + item, "title": f"item {item}"}) + "\n")
