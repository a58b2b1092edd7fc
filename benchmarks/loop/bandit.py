"""LinUCB (Li et al., 2010) as a baseline that learns online: a linear model of all items, an offset of each.

User and item have vectors from a truncated SVD of the past likes; the model sees ``[1, u * v, v, u . v]`` and
the reward is whether the item was liked. What it leaves unexplained of an item is that item's offset, shrunk,
with a bonus that falls with the number of times it was shown. Slates are the highest upper bounds; judges get
the highest means.
"""

import numpy as np

from .worlds import Floats, Ints, Levels, LoopWorld

DIMENSION = 16
WIDTH = 0.3
"""Of the upper bounds, in units of reward."""
SHRINK = 5.0
"""Showings that an offset's prior weighs."""


class LinUcb:
    """The bandit in one world."""

    def __init__(self, world: LoopWorld) -> None:
        self._world = world
        likes = np.zeros((len(world.past), len(world.items)))
        for row, items in enumerate(world.past):
            likes[row, list(items)] = 1.0
        likes /= np.maximum(np.linalg.norm(likes, axis=1, keepdims=True), 1.0)
        dimension = min(DIMENSION, *likes.shape)
        _, _, right = np.linalg.svd(likes[: len(world.learners)].T @ likes[: len(world.learners)])
        self._items = right[:dimension].T * np.sqrt(len(world.items) / dimension)
        self._users = likes @ right[:dimension].T
        self._users /= np.maximum(np.linalg.norm(self._users, axis=1, keepdims=True), 1e-9)
        size = 2 * dimension + 2
        self._gram, self._target = 10.0 * np.eye(size), np.zeros(size)
        self._shown, self._left = np.zeros(len(world.items)), np.zeros(len(world.items))

    def slates(self, rows: Ints, met: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]") -> Ints:
        """The highest upper bounds for learners ``rows``; ``met`` [rows, items] is left out."""
        found = np.empty((len(rows), self._world.places), dtype=np.int64)
        for place, row in enumerate(rows.tolist()):
            bound = np.where(met[place], -np.inf, self._means(row) + self._bonus(row))
            found[place] = np.argsort(-bound, kind="stable")[: self._world.places]
        return found

    def judged(self) -> Ints:
        """The highest means for the judges."""
        world = self._world
        scores = np.stack([self._means(row) for row in world.judges])
        return world.best(scores, world.judges)

    def learn(self, rows: Ints, slates: Ints, levels: Levels) -> None:
        """What learners ``rows`` did with their slates."""
        for row, items, marks in zip(rows.tolist(), slates, levels, strict=True):
            seen = marks > -2
            x, y = self._features(row)[items[seen]], (marks[seen] == 1).astype(np.float64)
            self._gram += x.T @ x
            self._target += x.T @ y
            self._left[items[seen]] += y - x @ np.linalg.solve(self._gram, self._target)
            self._shown[items[seen]] += 1.0

    def _features(self, row: int) -> Floats:
        user = self._users[row]
        product = self._items * user
        ones = np.ones((len(self._items), 1))
        return np.hstack([ones, product, self._items, product.sum(axis=1, keepdims=True)])

    def _means(self, row: int) -> Floats:
        weights = np.linalg.solve(self._gram, self._target)
        return np.asarray(self._features(row) @ weights + self._left / (self._shown + SHRINK))

    def _bonus(self, row: int) -> Floats:
        x = self._features(row)
        spread = np.einsum("if,if->i", x, np.linalg.solve(self._gram, x.T).T)
        return np.asarray(WIDTH * (np.sqrt(spread) + 1.0 / np.sqrt(self._shown + 1.0)))
