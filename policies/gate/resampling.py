"""The paired bootstrap over users: one set of resamples for everything that is compared.

``n`` users are drawn with replacement, the same draw for every column, so that differences stay paired and
columns stay correlated as they are (Efron & Tibshirani 1993, ch. 13). A column is one difference a user, NaN
for a user without a case in it; its resampled mean is over those drawn that have one.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .figures import Floats

Name = TypeVar("Name", bound=Hashable)

# Counts held at once: 4M float64 are 32 MB.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Resampled:
    """One column: its mean, and its means in the resamples."""

    mean: float
    means: Floats
    """float64[resamples]"""
    users: int

    def lower(self, confidence: float) -> float:
        """One-sided lower bound of the mean."""
        return float(np.quantile(self.means, 1.0 - confidence))

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(self.means.std())


def resample(
    columns: Mapping[Name, Floats], *, resamples: int, random: np.random.Generator
) -> dict[Name, Resampled]:
    """Resample the users of all ``columns`` (float64[n] each, NaN: no case) at once."""
    if not columns:
        return {}
    values = np.stack(list(columns.values()), axis=1)  # [n, columns]
    has = ~np.isnan(values)
    filled, present = np.where(has, values, 0.0), has.astype(np.float64)
    n = len(values)
    means = np.empty((resamples, len(columns)))
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        sums, sizes = counts @ filled, counts @ present
        with np.errstate(invalid="ignore"):  # a resample without any case of a column says nothing of it
            means[start : start + rows] = sums / sizes
    found = {}
    for place, name in enumerate(columns):
        own = means[:, place]
        users = int(has[:, place].sum())
        mean = float(filled[:, place].sum() / users) if users else float("nan")
        found[name] = Resampled(mean, own[~np.isnan(own)], users)
    return found


def simultaneous_uppers(columns: Mapping[str, Resampled], *, confidence: float) -> dict[str, float]:
    """Upper bounds that hold for all of ``columns`` together with ``confidence`` (max-t).

    mean_j + q * error_j, with q the ``confidence`` quantile, over the resamples, of the largest
    (mean_j - mean*_j) / error_j (Romano & Wolf, Econometrica 2005, single step). The columns overlap, so q
    lies well below Bonferroni's.
    """
    moving = {name: one for name, one in columns.items() if one.error > 0 and len(one.means)}
    if not moving:
        return {name: one.mean for name, one in columns.items()}
    rows = min(len(one.means) for one in moving.values())
    distances = np.stack([(one.mean - one.means[:rows]) / one.error for one in moving.values()])
    reach = float(np.quantile(distances.max(axis=0), confidence))
    return {name: one.mean + reach * one.error for name, one in columns.items()}


def lower_bound(
    differences: Floats, *, confidence: float, resamples: int, random: np.random.Generator
) -> float:
    """Bootstrap lower bound of the mean of ``differences`` [n] at one-sided ``confidence``."""
    if not np.any(differences != differences[0]):
        return float(differences[0])
    found = resample({"": differences}, resamples=resamples, random=random)
    return found[""].lower(confidence)
