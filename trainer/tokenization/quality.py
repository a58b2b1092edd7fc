"""How good SCIDs are as ids: are all codes used, and do items that share a prefix belong together?

Belonging together is sharing a category (``category_lift``), having been met by one user
(``together_lift``), or, for a new item placed by its text alone, sharing the category of its neighbours
(``new_item_lift``). Each is compared with the same codes dealt out anew over the items: ids without meaning
have a lift of 1. Sparse matrices instead of loops over pairs: seconds for 12,000 items.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

CodeArray = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

DRAWS = 1_000
"""Bootstrap samples behind an interval."""
_CELLS = 4_000_000
"""Weights held at once (draws times items): bounds memory, changes no result."""


@dataclass(frozen=True)
class PrefixLift:
    """Over pairs of items with the same first ``depth`` codes: how many more than by chance belong together.

    ``lift = share / permuted``, with a 95% bootstrap interval ``low`` .. ``high``. The items are drawn anew
    with replacement, item i ``w_i`` times; a pair i != j then counts ``w_i w_j`` times in ``share`` and in
    ``permuted`` (an item drawn twice is no pair). Where prefixes are small the interval is too wide rather
    than too narrow: on 100 worlds of ids without meaning it held 1 every time. Without pairs, or where
    nothing ever belongs together, lift and interval are 0.
    """

    depth: int
    items: int
    """Items compared: those with a category, all, or the new ones."""
    pairs: int
    """Pairs of items that share their first ``depth`` codes."""
    share: float
    """Share of these pairs that belong together."""
    permuted: float
    """The mean of that share over all permutations of the codes over the items, exactly."""
    low: float
    high: float

    @property
    def lift(self) -> float:
        """Share over permuted."""
        return self.share / self.permuted if self.permuted else 0.0

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON, the lift among them."""
        return asdict(self) | {"lift": self.lift}


def category_lift(
    codes: CodeArray, categories: Sequence[str | None], *, depth: int = 2, draws: int = DRAWS, seed: int = 0
) -> PrefixLift:
    """Do items of one prefix share their category? int [n, L]; one label an item, None: left out.

    With n_g items of prefix g, n_c of category c and n_gc of both::

        share    = sum_gc n_gc (n_gc - 1) / sum_g n_g (n_g - 1)
        permuted = sum_c  n_c  (n_c  - 1) / n (n - 1)

    A permutation keeps every n_g and makes each pair of items equally likely to be a pair of a prefix.
    """
    kept = np.array([label is not None for label in categories], dtype=bool)
    labels = _numbered(
        np.array([label for label in categories if label is not None], dtype=object).astype(str)
    )
    prefixes = _prefixes(codes[kept], depth)
    both = _numbered(prefixes * (int(labels.max(initial=0)) + 1) + labels)
    groups = [_members(one) for one in (both, prefixes, labels)]

    def counted(weights: FloatArray) -> FloatArray:
        """[n, draws] -> [draws, 4]: pairs of both, of a prefix, of a category, of all."""
        own = (weights**2).sum(axis=0)
        squares = [((group @ weights) ** 2).sum(axis=0) for group in groups]
        found: FloatArray = np.stack([*squares, weights.sum(axis=0) ** 2], axis=1) - own[:, None]
        return found

    return _lift(depth, len(labels), counted, draws, seed)


def together_lift(
    codes: CodeArray, met: sparse.csr_matrix, *, depth: int = 2, draws: int = DRAWS, seed: int = 0
) -> PrefixLift:
    """Were items of one prefix met by one user? int [n, L]; ``met`` as from ``met_together``, [n, n].

    With M the pairs that at least one user met both of, and G those of one prefix::

        share    = |M and G| / |G|
        permuted = |M| / (n (n - 1) / 2)
    """
    n = len(codes)
    prefixes = _prefixes(codes, depth)
    members = _members(prefixes)
    pairs = sparse.coo_matrix(met)
    kept = (pairs.data > 0) & (pairs.row < pairs.col)  # symmetric: each pair once
    row, column = pairs.row[kept], pairs.col[kept]
    ones = np.ones(len(row))
    known = sparse.csr_matrix((ones, (row, column)), shape=(n, n))
    alike = prefixes[row] == prefixes[column]
    same = sparse.csr_matrix((ones[alike], (row[alike], column[alike])), shape=(n, n))

    def counted(weights: FloatArray) -> FloatArray:
        """[n, draws] -> [draws, 4]: twice the pairs of both, of a prefix, met, of all."""
        own = (weights**2).sum(axis=0)
        return np.stack(
            [
                2 * (weights * (same @ weights)).sum(axis=0),
                ((members @ weights) ** 2).sum(axis=0) - own,
                2 * (weights * (known @ weights)).sum(axis=0),
                weights.sum(axis=0) ** 2 - own,
            ],
            axis=1,
        )

    return _lift(depth, n, counted, draws, seed)


def new_item_lift(
    codes: CodeArray,
    categories: Sequence[str | None],
    new_codes: CodeArray,
    new_categories: Sequence[str | None],
    *,
    depth: int = 2,
    draws: int = DRAWS,
    seed: int = 0,
) -> PrefixLift:
    """Do new items share the category of the known items they lie among?

    ``codes`` int [n, L] of the known items, ``new_codes`` int [m, L] of the new ones, known by text alone.
    With m_i known items in the prefix of new item i, s_i of them of its category c_i, and n_c known items of
    category c::

        share    = sum_i s_i / sum_i m_i
        permuted = sum_i m_i n_{c_i} / n / sum_i m_i

    The new items are what is drawn anew for the interval. Items without a category are left out.
    """
    known = np.array([label is not None for label in categories], dtype=bool)
    fresh = np.array([label is not None for label in new_categories], dtype=bool)
    n, m = int(known.sum()), int(fresh.sum())
    texts = [label for label in (*categories, *new_categories) if label is not None]
    labels = _numbered(np.array(texts, dtype=object).astype(str))
    prefixes = _prefixes(np.concatenate([codes[known], new_codes[fresh]]), depth)
    both = _numbered(prefixes * (int(labels.max(initial=0)) + 1) + labels)

    def among_known(groups: IntArray) -> FloatArray:
        """[m]: known items in the group of each new one."""
        counts = np.bincount(groups[:n], minlength=int(groups.max(initial=0)) + 1)
        return counts[groups[n:]].astype(np.float64)

    neighbours = among_known(prefixes)
    expected = neighbours * among_known(labels)
    each = np.stack([among_known(both), neighbours, expected, neighbours * n], axis=1)
    return _lift(depth, m, lambda weights: weights.T @ each, draws, seed, halves=1)


def met_together(histories: Sequence[IntArray], n_items: int, *, longest: int = 200) -> sparse.csr_matrix:
    """Users who met both items of a pair: symmetric CSR int32 [n_items, n_items], zero diagonal.

    ``histories``: item rows of each user, oldest first. Of more than ``longest`` the latest count: pairs
    grow with the square, and somebody who met everything says nothing about any two.
    """
    kept = [np.unique(np.asarray(history, dtype=np.int64)[-longest:]) for history in histories]
    columns = np.concatenate([np.empty(0, dtype=np.int64), *kept])
    bounds = np.concatenate([[0], np.cumsum([len(one) for one in kept])]).astype(np.int64)
    met = sparse.csr_matrix(
        (np.ones(len(columns), dtype=np.int32), columns, bounds), shape=(len(kept), n_items)
    )
    together = sparse.csr_matrix(met.T @ met)
    together.setdiag(0)
    together.eliminate_zeros()
    return together


def codebook_use(codes: CodeArray, sizes: Sequence[int]) -> tuple[float, ...]:
    """Share of each level's codes that some row of int [n, L] has."""
    return tuple(len(np.unique(codes[:, level])) / size for level, size in enumerate(sizes))


def codebook_perplexity(codes: CodeArray) -> tuple[float, ...]:
    """exp(entropy of each level's codes), natural logarithm; int [n, L] -> L numbers."""
    out = []
    for level in range(codes.shape[1]):
        share = np.unique(codes[:, level], return_counts=True)[1] / len(codes)
        out.append(float(np.exp(-(share * np.log(share)).sum())))
    return tuple(out)


def ambiguous_items(codes: CodeArray) -> int:
    """Items whose SCID another item has too: 0 of every codec that may be used."""
    if len(codes) == 0:
        return 0
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _lift(
    depth: int,
    items: int,
    counted: Callable[[FloatArray], FloatArray],
    draws: int,
    seed: int,
    *,
    halves: int = 2,
) -> PrefixLift:
    """From ``counted``: weights [n, draws] -> [draws, 4], ``halves`` times (hits, pairs, chance hits, of)."""
    if items == 0:
        return PrefixLift(depth, 0, 0, 0.0, 0.0, 0.0, 0.0)
    hits, pairs, chance, everything = counted(np.ones((items, 1)))[0]
    if min(pairs, chance) <= 0:
        share = hits / pairs if pairs > 0 else 0.0
        permuted = chance / everything if everything > 0 else 0.0
        return PrefixLift(depth, items, round(pairs / halves), float(share), float(permuted), 0.0, 0.0)
    found = np.concatenate([counted(weights) for weights in _resampled(items, draws, seed)])
    usable = found[(found[:, 1] > 0) & (found[:, 2] > 0)]
    lifts = usable[:, 0] * usable[:, 3] / (usable[:, 1] * usable[:, 2])
    low, high = np.percentile(lifts, [2.5, 97.5]) if len(lifts) else (0.0, 0.0)
    share, permuted = float(hits / pairs), float(chance / everything)
    return PrefixLift(depth, items, round(pairs / halves), share, permuted, float(low), float(high))


def _resampled(n: int, draws: int, seed: int) -> Iterator[FloatArray]:
    """How often each of n items is drawn, float64 [n, some draws], until there are ``draws``."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CELLS // n)
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        # One draw after the other: the numbers do not depend on how many are held at once.
        yield np.stack(
            [np.bincount(random.integers(0, n, n), minlength=n) for _ in range(count)], axis=1
        ).astype(np.float64)


def _prefixes(codes: CodeArray, depth: int) -> IntArray:
    """Number of the prefix that each row of int [n, L] begins with, int64 [n]."""
    if len(codes) == 0:
        return np.empty(0, dtype=np.int64)
    return np.asarray(np.unique(codes[:, :depth], axis=0, return_inverse=True)[1].ravel(), dtype=np.int64)


def _numbered(values: npt.NDArray[np.generic]) -> IntArray:
    """Equal values get equal numbers from 0, int64 [n]."""
    return np.asarray(np.unique(values, return_inverse=True)[1].ravel(), dtype=np.int64)


def _members(groups: IntArray) -> sparse.csr_matrix:
    """One-hot rows: float64 [groups, n]."""
    n = len(groups)
    shape = (int(groups.max(initial=-1)) + 1, n)
    return sparse.csr_matrix((np.ones(n), (groups, np.arange(n))), shape=shape)
