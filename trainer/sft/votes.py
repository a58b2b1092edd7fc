"""Item-to-item votes: counted in seconds, without training; baselines, and most of the teacher.

Item i speaks for item j with the weight W[i, j]. After a history h_1 .. h_t an item scores

    s(j) = sum_{r=1..10} 1/r · W[h_{t+1-r}, j],    0 for j already in the history.

Three ways to know W:

- *sequential rules*: C[i, j] / n_i^.5 with C[i, j] the sum over training histories of 1/distance (item j
  after item i) and n_i the occurrences of i. On the Beauty reference data this alone reaches Recall@10 .0849.
- *shared users* (Sarwar et al. 2001): |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrink), the nearest of each i.
- *like texts*: the cosine of two items' TF-IDF vectors, cubed, the nearest of each i. Weak alone, but it
  knows what no interaction says: what it adds to SASRec and rules is in docs/benchmarks.md.

What a history itself put into the first two is known pair by pair (``own``), so that a teacher can leave it
out and never quotes the answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trainer.tokenization.collaborative import directed_cooccurrences
from trainer.tokenization.text import tfidf_matrix

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RECENT = 10
"""Items of the history that vote."""
WINDOW = 50
"""Longest distance of a rule."""
DAMPING = 0.5
NEIGHBOURS = 20
SHRINK = 30.0
"""Of shared users: the best Recall@10 of 10 to 300 neighbours and shrink 0 to 120 on the validation item of
4,000 users of Beauty."""
TEXT_NEIGHBOURS = 50
SHARPNESS = 3.0
"""Power of a cosine of texts: of 2, 3, 5 and 50 or 200 neighbours the best on validation items of Beauty, by
little."""
TEXT_VOCABULARY = 50_000
CELLS = 16_000_000
"""Cosines held at a time."""

Own = Callable[[int, IntArray, IntArray], Doubles]
"""(item a, items b, distances) -> what a history that holds b so far behind a has put into W[a, b]."""


@dataclass(frozen=True)
class Votes:
    """W, and what a history has in it."""

    weights: sparse.csr_matrix
    """float64 CSR [n_items, n_items], columns of a row in order."""
    own: Own | None = None
    """None: no history put anything there."""

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """s of every item after each history: float32 [n, n_items], dense."""
        users, items, votes = [], [], []
        for user, history in enumerate(histories):
            recent = np.asarray(history, dtype=np.int64)[: -RECENT - 1 : -1]
            users.append(np.full(len(recent), user))
            items.append(recent)
            votes.append(1.0 / np.arange(1, len(recent) + 1))
        n_items = self.weights.shape[0]
        if not users:
            return np.zeros((0, n_items), dtype=np.float32)
        voting = sparse.coo_matrix(
            (np.concatenate(votes), (np.concatenate(users), np.concatenate(items))),
            shape=(len(histories), n_items),
        ).tocsr()
        scores: FloatArray = (voting @ self.weights).toarray().astype(np.float32)
        for user, history in enumerate(histories):
            scores[user, history] = 0.0
        return scores

    def along(self, histories: Sequence[IntArray]) -> Iterator[tuple[IntArray, Doubles]]:
        """(items, scores) at each position but the first of each training history, its own part left out."""
        for history in histories:
            if len(history) > 1:
                yield from self._along(history)

    def _along(self, history: IntArray) -> Iterator[tuple[IntArray, Doubles]]:
        columns, weights = self._rows(history)
        where = np.searchsorted(columns, history)
        for position in range(1, len(history)):
            voting = np.arange(max(0, position - RECENT), position)
            scores = (weights[voting] / (position - voting)[:, None]).sum(axis=0)
            known = where[:position]
            inside = known < len(columns)
            scores[known[inside][columns[known[inside]] == history[:position][inside]]] = 0.0
            yield columns, scores

    def _rows(self, history: IntArray) -> tuple[IntArray, Doubles]:
        """(items [C], weights that each item but the last gives them [len - 1, C]), its own part left out."""
        found = self.weights[history[:-1]]
        columns, place = np.unique(found.indices, return_inverse=True)
        weights = np.zeros((len(history) - 1, len(columns)))
        weights[np.repeat(np.arange(len(history) - 1), np.diff(found.indptr)), place] = found.data
        if self.own is not None and len(columns):
            where = np.minimum(np.searchsorted(columns, history), len(columns) - 1)
            for a in range(len(history) - 1):
                later = np.arange(a + 1, len(history))
                later = later[columns[where[later]] == history[later]]
                np.subtract.at(weights[a], where[later], self.own(int(history[a]), history[later], later - a))
            np.maximum(weights, 0.0, out=weights)
            weights[weights < 1e-9] = 0.0  # rounding of the subtraction
        return columns.astype(np.int64), weights


def sequential_rules(histories: Sequence[IntArray], n_items: int) -> Votes:
    """What follows what in ``histories`` (item numbers, oldest first)."""
    counts = directed_cooccurrences(histories, n_items, window=WINDOW)
    met = np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]), minlength=n_items)
    damp = np.maximum(met.astype(np.float64), 1.0) ** -DAMPING

    def own(a: int, _: IntArray, distance: IntArray) -> Doubles:
        return np.where(distance <= WINDOW, damp[a] / distance, 0.0)

    return Votes((sparse.diags(damp) @ counts).tocsr(), own)


def shared_users(
    histories: Sequence[IntArray], n_items: int, *, neighbours: int = NEIGHBOURS, shrink: float = SHRINK
) -> Votes:
    """Items that the same users met, whatever the order."""
    owner = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    flat = np.concatenate([*histories, np.zeros(0, np.int64)])
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

    def own(a: int, b: IntArray, _: IntArray) -> Doubles:
        return np.asarray(1.0 / (np.sqrt(users[a] * users[b]) + shrink), dtype=np.float64)

    return Votes(_largest(together, neighbours), own)


def like_texts(texts: Sequence[str]) -> Votes:
    """Items whose texts resemble each other; one text an item, which may be empty."""
    vectors = tfidf_matrix(texts, vocabulary=TEXT_VOCABULARY, ngrams=1)
    step = max(CELLS // max(len(texts), 1), 1)
    kept = [_likest(vectors, start, min(start + step, len(texts))) for start in range(0, len(texts), step)]
    return Votes(sparse.vstack(kept, format="csr") if kept else sparse.csr_matrix((0, 0)))


def _likest(vectors: sparse.csr_matrix, start: int, end: int) -> sparse.csr_matrix:
    """W of items ``start`` to ``end``: CSR [end - start, n_items]."""
    cosines = (vectors[start:end] @ vectors.T).toarray()
    rows = np.arange(end - start)
    cosines[rows, rows + start] = 0.0
    most = min(TEXT_NEIGHBOURS, cosines.shape[1])
    columns = np.sort(np.argpartition(cosines, -most, axis=1)[:, -most:], axis=1)
    weights = np.take_along_axis(cosines, columns, axis=1) ** SHARPNESS
    places = (np.repeat(rows, most), columns.ravel())
    found = sparse.csr_matrix((weights.ravel(), places), shape=cosines.shape)
    found.eliminate_zeros()
    return found


def _largest(matrix: sparse.csr_matrix, keep: int) -> sparse.csr_matrix:
    """The ``keep`` largest entries of each row, ties by column; columns in order."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((matrix.indices, -matrix.data, rows))
    place = np.arange(len(order)) - matrix.indptr[rows]  # rows stay in order
    kept = order[place < keep]
    found = sparse.csr_matrix((matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape)
    found.sort_indices()
    return found
