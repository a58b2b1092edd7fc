"""One SCID, one item: codes that collide are resolved by assignment on the last level.

Items that share all codes but the last are a group. A group of at most K items gets K different last codes
at the least total distance between the items' residuals and the codes' vectors (optimal assignment); only
groups with a collision are touched. A group of more than K items cannot be told apart by the last level: then
one further level, a number among the items that share all codes, is added to every SCID (0 where nothing is
shared), so that all have one length.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from trainer.errors import TrainerError

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class UniqueCodes:
    """Codes after resolution. Invariant: the rows of ``codes`` are pairwise different."""

    codes: CodeArray
    """[n_items, L] or, with a further level, [n_items, L + 1]."""
    sizes: tuple[int, ...]
    """Codebook size of each level of ``codes``."""
    collision_rate: float
    """Share of items whose SCID was shared with another item before resolution."""
    moved: int
    """Items whose last code was changed by the assignment."""


def unique_codes(codes: CodeArray, residuals: FloatArray, last_codebook: FloatArray) -> UniqueCodes:
    """Make every row of ``codes`` different.

    ``codes``: int32 [n_items, L], nearest codes. ``residuals``: float32 [n_items, D], what is left of each
    item's vector before its last code. ``last_codebook``: float32 [K, D]. Levels are taken to have K codes
    each, the number of the last codebook.
    """
    n_items, levels = codes.shape
    size = len(last_codebook)
    rate = collision_rate(codes)
    out = codes.copy()
    sizes: tuple[int, ...] = (size,) * levels
    for group in _groups(codes[:, :-1]):
        if len(group) <= size and len(np.unique(codes[group, -1])) < len(group):
            distance = _squared_distances(residuals[group], last_codebook)
            rows, columns = linear_sum_assignment(distance)
            out[group[rows], -1] = columns
    extra = _number_within(out)
    if extra.any():
        out = np.concatenate([out, extra[:, None]], axis=1)
        sizes = (*sizes, int(extra.max()) + 1)
    if len(np.unique(out, axis=0)) != n_items:
        raise TrainerError("SCIDs are not unique after assignment: this is a defect, please report it")
    return UniqueCodes(out, sizes, rate, int((out[:, levels - 1] != codes[:, -1]).sum()))


def collision_rate(codes: CodeArray) -> float:
    """Share of rows of int [n, L] that equal another row."""
    if len(codes) == 0:
        return 0.0
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return float((counts[inverse.ravel()] > 1).mean())


def _groups(prefixes: CodeArray) -> list[npt.NDArray[np.int64]]:
    """Row numbers of equal rows, each group ascending."""
    if prefixes.shape[1] == 0:
        return [np.arange(len(prefixes))]
    _, inverse = np.unique(prefixes, axis=0, return_inverse=True)
    inverse = inverse.ravel()
    order = np.argsort(inverse, kind="stable")
    bounds = np.flatnonzero(np.diff(inverse[order])) + 1
    return [group for group in np.split(order, bounds) if len(group)]


def _number_within(codes: CodeArray) -> CodeArray:
    """For each row its number among the rows equal to it, int32 [n]."""
    numbers = np.zeros(len(codes), dtype=np.int32)
    for group in _groups(codes):
        numbers[group] = np.arange(len(group), dtype=np.int32)
    return numbers


def _squared_distances(points: FloatArray, centres: FloatArray) -> npt.NDArray[np.float64]:
    difference = points[:, None, :].astype(np.float64) - centres[None, :, :]
    return np.asarray((difference**2).sum(axis=-1))
