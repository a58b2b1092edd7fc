"""How good SCIDs are as ids: are all codes used, and do items that share a prefix belong together?

Purity at depth d is the share of pairs of items with the same first d codes that have the same category; by
chance (the same codes dealt out anew over the items) it would be ``sum_c n_c (n_c - 1) / (n (n - 1))``, so
their ratio, the lift, is 1 for ids without meaning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CodeArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PrefixPurity:
    """Purity of the prefixes of one depth, over the items that have a category."""

    depth: int
    pairs: int
    """Pairs of items that share their first ``depth`` codes."""
    purity: float
    """Share of them with the same category; 0 without pairs."""
    chance: float

    @property
    def lift(self) -> float:
        """Purity over chance."""
        return self.purity / self.chance if self.chance else 0.0


def prefix_purity(codes: CodeArray, categories: Sequence[str | None]) -> list[PrefixPurity]:
    """For depths 1 .. L - 1 of int [n, L]; ``categories`` one label an item, None where there is none."""
    kept = np.array([label is not None for label in categories], dtype=bool)
    labels = np.unique([label for label in categories if label is not None], return_inverse=True)[1]
    codes = codes[kept]
    everything = _pairs(np.bincount(labels)) if len(labels) else 0
    chance = everything / max(len(labels) * (len(labels) - 1) // 2, 1)
    found = []
    for depth in range(1, codes.shape[1]):
        prefix = np.unique(codes[:, :depth], axis=0, return_inverse=True)[1].ravel()
        pairs = _pairs(np.bincount(prefix)) if len(prefix) else 0
        both = np.unique(np.stack([prefix, labels.ravel()], axis=1), axis=0, return_counts=True)[1]
        found.append(PrefixPurity(depth, pairs, _pairs(both) / max(pairs, 1), chance))
    return found


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


def _pairs(counts: npt.NDArray[np.int64]) -> int:
    """Pairs within groups of these sizes."""
    return int((counts * (counts - 1) // 2).sum())
