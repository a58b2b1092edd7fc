"""Sequential rules: which item follows which, counted in seconds; a baseline and half of the teacher.

Rule i -> j has the weight C[i, j] / n_i^damping with C[i, j] the sum over training histories of 1/distance
(item j after item i) and n_i the occurrences of i. After a history h_1 .. h_t an item scores

    s(j) = sum_{r=1..10} 1/r · C[h_{t+1-r}, j] / n_{h_{t+1-r}}^damping,    0 for j already in the history.

On the Beauty reference data this alone reaches Recall@10 .0849 (benchmarks/results/offline_beauty.json).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trainer.tokenization.collaborative import directed_cooccurrences

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

RECENT = 10
"""Items of the history that vote."""
WINDOW = 50
"""Longest distance of a rule."""
DAMPING = 0.5


@dataclass(frozen=True)
class Rules:
    """The rules of some histories."""

    counts: sparse.csr_matrix
    """C, float64 CSR [n_items, n_items]."""
    damp: npt.NDArray[np.float64]
    """[n_items]: n_i^-damping."""

    @classmethod
    def fit(cls, histories: Sequence[IntArray], n_items: int) -> "Rules":
        """Count the rules of ``histories`` (item numbers, oldest first)."""
        counts = directed_cooccurrences(histories, n_items, window=WINDOW)
        seen = np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]), minlength=n_items)
        return cls(counts, np.maximum(seen, 1).astype(np.float64) ** -DAMPING)

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """s of every item after each history: float32 [n, n_items], dense."""
        users, items, votes = [], [], []
        for user, history in enumerate(histories):
            recent = np.asarray(history, dtype=np.int64)[: -RECENT - 1 : -1]
            users.append(np.full(len(recent), user))
            items.append(recent)
            votes.append(self.damp[recent] / np.arange(1, len(recent) + 1))
        n_items = self.counts.shape[0]
        if not users:
            return np.zeros((0, n_items), dtype=np.float32)
        voting = sparse.coo_matrix(
            (np.concatenate(votes), (np.concatenate(users), np.concatenate(items))),
            shape=(len(histories), n_items),
        ).tocsr()
        scores: FloatArray = (voting @ self.counts).toarray().astype(np.float32)
        for user, history in enumerate(histories):
            scores[user, history] = 0.0
        return scores
