"""Who met what, and the pairs that alignment learns from: (what a user did so far, the item met next).

All of it comes from the training histories that are passed in; nothing later can leak. A share of users lends
its last pair for watching: those pairs are never trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from policies.users import MAX_HISTORY

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

WATCHED_SHARE = 0.05
MAX_WATCHED = 2_000
"""Held-out pairs at most: enough for an AUC that is good to a few thousandths."""

WATCHED_CELLS = 50_000_000
"""Held-out pairs times items at most: each is compared with the whole catalogue."""


@dataclass(frozen=True)
class Interactions:
    """Training histories as one flat array of item rows, user after user, oldest first."""

    flat: IntArray
    """[entries] item rows."""
    starts: IntArray
    """[users + 1] where each user's entries begin."""
    n_items: int
    watched: IntArray
    """[w] places in ``flat`` of the held-out items: each the last of its user's."""

    @classmethod
    def of(cls, histories: Sequence[IntArray], n_items: int, *, seed: int) -> "Interactions":
        """``histories``: item rows of each user. Users with three items and more may lend their last one."""
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.concatenate([np.empty(0, np.int64), *histories]).astype(np.int64)
        able = np.flatnonzero(lengths >= 3)
        wanted = min(int(np.ceil(WATCHED_SHARE * len(able))), MAX_WATCHED, max(100, WATCHED_CELLS // n_items))
        lenders = np.sort(np.random.default_rng([seed, 7]).permutation(able)[:wanted])
        return cls(flat, starts, n_items, starts[lenders + 1] - 1)

    @property
    def users(self) -> int:
        """How many histories there are."""
        return len(self.starts) - 1

    @cached_property
    def owner(self) -> IntArray:
        """[entries] the user of each entry."""
        return np.repeat(np.arange(self.users), np.diff(self.starts))

    @cached_property
    def pairs(self) -> IntArray:
        """Places in ``flat`` that are trained on: each is the item met next after what stands before it."""
        place = np.arange(len(self.flat))
        trained = place > self.starts[self.owner]
        trained[self.watched] = False
        return place[trained]

    def shown(self) -> list[IntArray]:
        """Each user's history without the held-out pair."""
        ends = self.starts[1:].copy()
        ends[self.owner[self.watched]] -= 1
        return [self.flat[start:end] for start, end in zip(self.starts[:-1], ends, strict=True)]

    def before(self, places: IntArray) -> IntArray:
        """[n] places -> item rows [n, 20] of what their users did before, the latest last, -1 behind."""
        first = np.maximum(self.starts[self.owner[places]], places - MAX_HISTORY)
        at = first[:, None] + np.arange(MAX_HISTORY)
        return np.where(at < places[:, None], self.flat[np.minimum(at, len(self.flat) - 1)], -1)

    def met(self, users: IntArray, items: IntArray) -> BoolArray:
        """bool [len(users), len(items)]: did the user meet the item, ever. No loop over either.

        Held-out pairs count as met: they are nobody's negatives.
        """
        distinct, column = np.unique(items, return_inverse=True)
        slot = np.full(self.n_items, -1, dtype=np.int64)
        slot[distinct] = np.arange(len(distinct))
        lengths = self.starts[users + 1] - self.starts[users]
        row = np.repeat(np.arange(len(users)), lengths)
        within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found = slot[self.flat[self.starts[users][row] + within]]
        table = np.zeros((len(users), len(distinct)), dtype=np.bool_)
        table[row[found >= 0], found[found >= 0]] = True
        return np.asarray(table[:, column.ravel()])

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """[n_items] share of the trained pairs whose item it is: q of the logQ correction."""
        counts = np.bincount(self.flat[self.pairs], minlength=self.n_items)
        return np.asarray(counts / max(counts.sum(), 1))


def batches(n: int, size: int, *, seed: int, epoch: int) -> list[IntArray]:
    """Shuffled batches of 0..n-1: a function of (n, size, seed, epoch), so that a resumed run sees the same.

    A last batch of a single pair has no negatives and is joined to the one before.
    """
    order = np.random.default_rng([seed, epoch, 11]).permutation(n)
    cut = [order[start : start + size] for start in range(0, n, size)]
    if len(cut) > 1 and len(cut[-1]) == 1:
        cut[-2:] = [np.concatenate(cut[-2:])]
    return cut
