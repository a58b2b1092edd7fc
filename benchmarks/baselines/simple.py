"""Baselines without training: what is popular, and ItemKNN.

A ranking model scores the catalogue after each history (trainer.metrics.RankingModel).
"""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from trainer.metrics import FloatArray, IntArray


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

    The order of the history plays no part. Default constants: the best Recall@10 of 10 to 300 neighbours and
    shrink 0 to 120 on the validation item of 4,000 users of Beauty.
    """

    def __init__(
        self,
        histories: Sequence[IntArray],
        n_items: int,
        *,
        neighbours: int = 20,
        shrink: float = 30.0,
    ) -> None:
        owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        flat = np.concatenate(histories)
        met = sparse.csr_matrix(
            (np.ones(len(flat)), (owner, flat)), shape=(len(histories), n_items), dtype=np.float64
        )
        met.data[:] = 1.0  # an item met twice counts once
        together = (met.T @ met).tocsr()
        users = together.diagonal()
        together.setdiag(0.0)
        together.eliminate_zeros()
        rows = np.repeat(np.arange(n_items), np.diff(together.indptr))
        together.data /= np.sqrt(users[rows] * users[together.indices]) + shrink
        self.similar = _largest(together, neighbours).astype(np.float32)

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]; 0 for items that are no neighbour."""
        owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
        flat = np.concatenate(histories)
        asked = sparse.csr_matrix(
            (np.ones(len(flat), np.float32), (owner, flat)), shape=(len(histories), self.similar.shape[0])
        )
        return np.asarray((asked @ self.similar).todense(), dtype=np.float32)


def _largest(matrix: sparse.csr_matrix, keep: int) -> sparse.csr_matrix:
    """The ``keep`` largest entries of each row, ties by column."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows]  # rows stay in order
    kept = order[place < keep]
    return sparse.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)
