"""What happened before us: an old system pushed its favourites, and kept only what users liked of them.

Its log is what the base policy learns from. The bias is the point: what was pushed is liked often, what was
never shown was never liked, and nothing says what users disliked. That is the room RF-DPO has.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reactions import Reaction, react
from .world import World

SLATE = 10
# How much more often the old system showed a genre that the user has liked before (log weight).
OLD_PERSONALISATION = 1.0


@dataclass(frozen=True)
class Past:
    """Old engagement: rows ``users`` and ``items``, ``steps`` (which slate), ``reactions``; parallel."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    steps: NDArray[np.int64]
    reactions: NDArray[np.int8]

    def histories(self, users: range) -> list[list[int]]:
        """Items (rows) that each of ``users`` engaged with, oldest first."""
        found: dict[int, list[int]] = {row: [] for row in users}
        for user, item in zip(self.users.tolist(), self.items.tolist(), strict=True):
            if user in found:
                found[user].append(item)
        return [found[row] for row in users]


def old_engagement(world: World) -> Past:
    """Run the old system: it shows what it pushes, a little more of genres the user liked; likes are kept."""
    random = np.random.default_rng([world.seed, 2])
    users, items = world.utility.shape
    genre_names = sorted({item.genre for item in world.items})
    genre = np.array([genre_names.index(item.genre) for item in world.items])
    pushed = np.log(world.exposure).astype(np.float32)
    liked_genres = np.zeros((users, len(genre_names)), np.float32)
    shown = np.zeros((users, items), bool)
    kept: list[tuple[NDArray[np.int64], NDArray[np.int64], int, NDArray[np.int8]]] = []
    for step in range(world.size.old_slates):
        preference = liked_genres / np.maximum(liked_genres.max(axis=1, keepdims=True), 1.0)
        # Gumbel noise (minus the log of an exponential): the top k is a draw without replacement.
        drawn = random.standard_exponential((users, items), dtype=np.float32)
        noise = np.log(np.maximum(drawn, 1e-30))
        scores = pushed + OLD_PERSONALISATION * preference[:, genre] - noise
        scores[shown] = -np.inf
        slates = top(scores, SLATE)
        np.put_along_axis(shown, slates, True, axis=1)
        reactions = react(np.take_along_axis(world.utility, slates, axis=1), random)
        rows, columns = np.nonzero((reactions == Reaction.LIKE) | (reactions == Reaction.READ))
        engaged = slates[rows, columns]
        np.add.at(liked_genres, (rows, genre[engaged]), 1.0)
        kept.append((rows, engaged, step, reactions[rows, columns]))
    return Past(
        users=np.concatenate([rows for rows, _, _, _ in kept]),
        items=np.concatenate([engaged for _, engaged, _, _ in kept]),
        steps=np.concatenate([np.full(len(rows), step) for rows, _, step, _ in kept]),
        reactions=np.concatenate([drawn for _, _, _, drawn in kept]),
    )


def top(scores: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Columns of the ``k`` highest of each row, best first: [rows, columns] -> [rows, k]."""
    found = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)
