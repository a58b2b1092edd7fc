"""Baselines without training: what is popular, and ItemKNN.

A ranking model scores the catalogue after each history (trainer.metrics.RankingModel).
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from trainer.metrics import FloatArray, IntArray
from trainer.sft.votes import NEIGHBOURS, SHRINK, shared_users


class Popularity:
    """Everybody gets the items that the most training histories hold."""

    def __init__(self, histories: Sequence[IntArray], n_items: int) -> None:
        self.counts = np.bincount(np.concatenate(histories), minlength=n_items).astype(np.float32)

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]: the same row for each."""
        return np.tile(self.counts, (len(histories), 1))


class ItemKnn:
    """Item-based nearest neighbours (Sarwar et al. 2001): ``s(j) = sum_{i in history} sim(i, j)`` with

        sim(i, j) = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrink),    the ``neighbours`` largest of each i.

    The order of the history plays no part.
    """

    def __init__(
        self,
        histories: Sequence[IntArray],
        n_items: int,
        *,
        neighbours: int = NEIGHBOURS,
        shrink: float = SHRINK,
    ) -> None:
        votes = shared_users(histories, n_items, neighbours=neighbours, shrink=shrink)
        self.similar = votes.weights.astype(np.float32)

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]; 0 for items that are no neighbour."""
        owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        flat = np.concatenate(histories)
        asked = sparse.csr_matrix(
            (np.ones(len(flat), np.float32), (owner, flat)), shape=(len(histories), self.similar.shape[0])
        )
        return np.asarray((asked @ self.similar).todense(), dtype=np.float32)
