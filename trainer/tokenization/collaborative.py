"""Collaborative item embeddings: who is met together, from training histories only.

A history is read as a sentence: two items at distance d in it (window w) count 1/d for each other. The
positive pointwise mutual information of these counts, shifted by log k, is factorised by a truncated SVD;
the item vectors are U·sqrt(S). This is the matrix that skip-gram with k negative samples factorises
implicitly (Levy & Goldberg, "Neural word embedding as implicit matrix factorization", NIPS 2014); the
context distribution is smoothed by the power 0.75 (Levy, Goldberg & Dagan, TACL 2015). It takes seconds,
has no training loop, and is deterministic.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse

from .svd import truncated_svd

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

CONTEXT_SMOOTHING = 0.75


def collaborative_embeddings(
    histories: Sequence[IntArray],
    n_items: int,
    *,
    dimension: int = 64,
    window: int = 10,
    shift: float = 1.0,
) -> FloatArray:
    """Vectors of all items, float32 [n_items, dimension], each of length 1 or all zero.

    ``histories``: one int array of item indices a user, oldest first. An item that no history pairs with
    another gets the zero vector: it has no behaviour to describe it. With fewer items than dimensions the
    missing columns are zero.
    """
    vectors = np.zeros((n_items, dimension), dtype=np.float32)
    counts = cooccurrences(histories, n_items, window=window)
    if counts.nnz == 0:
        return vectors
    ppmi = shifted_ppmi(counts, shift=shift)
    if ppmi.nnz == 0:
        return vectors
    left, singular, _ = truncated_svd(ppmi, dimension)
    vectors[:, : len(singular)] = left * np.sqrt(singular)
    # Rounding in the SVD leaves dust on items without pairs: they are exactly zero here.
    vectors[np.asarray(ppmi.sum(axis=1)).ravel() == 0] = 0.0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    np.divide(vectors, norms, out=vectors, where=norms > 0)
    return vectors


def cooccurrences(histories: Sequence[IntArray], n_items: int, *, window: int) -> sparse.csr_matrix:
    """Symmetric counts, float64 CSR [n_items, n_items]: sum over histories of 1/distance, zero diagonal."""
    forward = directed_cooccurrences(histories, n_items, window=window)
    both = (forward + forward.T).tocsr()
    both.setdiag(0)
    both.eliminate_zeros()
    return both


def directed_cooccurrences(histories: Sequence[IntArray], n_items: int, *, window: int) -> sparse.csr_matrix:
    """Counts of item -> later item, float64 CSR [n_items, n_items]: sum of 1/distance within the window."""
    kept = [np.asarray(history, dtype=np.int64) for history in histories if len(history) > 1]
    if not kept:
        return sparse.csr_matrix((n_items, n_items), dtype=np.float64)
    flat = np.concatenate(kept)
    owner = np.repeat(np.arange(len(kept)), [len(history) for history in kept])
    rows, columns, weights = [], [], []
    for distance in range(1, window + 1):
        same = owner[distance:] == owner[:-distance]
        if not same.any():
            break
        rows.append(flat[:-distance][same])
        columns.append(flat[distance:][same])
        weights.append(np.full(int(same.sum()), 1.0 / distance))
    counts = sparse.coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(n_items, n_items)
    ).tocsr()
    counts.sum_duplicates()
    counts.sort_indices()
    return counts


def shifted_ppmi(counts: sparse.csr_matrix, *, shift: float) -> sparse.csr_matrix:
    """max(0, log( #(i,j) · total^.75 / (#(i) · #(j)^.75) ) - log shift), CSR [n_items, n_items]."""
    coo = counts.tocoo()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    smooth = totals**CONTEXT_SMOOTHING
    context = smooth / smooth.sum()
    pmi = np.log(coo.data / (totals[coo.row] * context[coo.col])) - np.log(shift)
    positive = pmi > 0
    return sparse.csr_matrix((pmi[positive], (coo.row[positive], coo.col[positive])), shape=counts.shape)
