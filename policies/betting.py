"""How much better one group does than another, as an interval that may be looked at at any time: by betting.

Members of the two groups become known one after another; the side of the next one has nothing to do with what
he makes of it. A *block* ends as soon as it holds members of both sides. Its difference ``D_i``, mean of the
treated less mean of the others, lies in [-1, 1] and has the expectation ``m`` whatever came before. A bet
against "the mean is at most m" multiplies its stake at every block and, if so, gains nothing on average:

    K(m) = mean over c of prod_i (1 + c w_i ((1 + D_i) / (1 + m) - 1)),      0 < c < 1,  0 < w_i < 1

(Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 2024). By Ville's
inequality K(m) ever reaches ``1 / alpha`` with a probability of at most alpha, so the lower end is the
largest m for which it has; the upper end is the lower one of ``-D``. ``w_i`` is small where a block holds
few: that is known without looking at what they made of it. Blocks only ever end, so what was looked at once
stays as it was.

Against ``sequential``, which bounds the same bets from outside, it is a third narrower at 250 observations of
which each spreads over a tenth of its range, and costs a pass over all of them at every look.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from .errors import PoliciesError
from .sequential import Floats

_BETS = np.geomspace(0.02, 0.9, 10)
"""c: the best one for a mean of ``m`` and a variance of ``v`` is near ``m / v``."""
_EXACT = 1e-4
"""To which the ends are worked out; they are rounded outwards."""


@dataclass(frozen=True)
class Blocks:
    """Differences of treated and others, block by block."""

    differences: Floats
    weights: Floats

    @classmethod
    def of(cls, values: Floats, treated: NDArray[np.bool_]) -> "Blocks":
        """Cut members, in the order in which they became known, into blocks. ``values`` lie in 0 .. 1.

        A block is a run of one side and the first of the other side after it: a weight of n / (n + 1).
        Raises PoliciesError for a value that is outside of 0 .. 1.
        """
        if len(values) and not (values.min() >= 0.0 and values.max() <= 1.0):
            raise PoliciesError("what is compared by betting must lie between 0 and 1")
        starts, ends, start = [], [], 0
        for end in (np.flatnonzero(treated[1:] != treated[:-1]) + 1).tolist():
            if end > start:  # else the run was one member long, and ended the block before
                starts.append(start)
                ends.append(end)
                start = end + 1
        first, last = np.array(starts, dtype=np.intp), np.array(ends, dtype=np.intp)
        sums = np.concatenate([[0.0], np.cumsum(values)])
        differences = values[last] - (sums[last] - sums[first]) / (last - first)
        signed = np.clip(np.where(treated[last], differences, -differences), -1.0, 1.0)
        return cls(signed, (last - first) / (last - first + 1))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Holds the mean difference at all looks together; each side alone with ``1 - alpha / 2``."""
        if not 0.0 < alpha < 1.0:
            raise PoliciesError(f"an interval needs alpha between 0 and 1, not {alpha}")
        return (
            _low(self.differences, self.weights, alpha / 2),
            -_low(-self.differences, self.weights, alpha / 2),
        )


def _low(differences: Floats, weights: Floats, alpha: float) -> float:
    """The largest mean of which K has reached ``1 / alpha``, rounded down; -1 where there is none."""
    wanted = -math.log(alpha)

    def excess(mean: float) -> float:
        return _log_capital(differences, weights, mean) - wanted

    least = -1.0 + _EXACT
    if not len(differences) or excess(least) < 0.0:
        return -1.0
    return max(-1.0, float(brentq(excess, least, 1.0, xtol=_EXACT)) - _EXACT)


def _log_capital(differences: Floats, weights: Floats, mean: float) -> float:
    """log K: it falls as ``mean`` rises."""
    gains = weights * ((1.0 + differences) / (1.0 + mean) - 1.0)
    logs = np.log1p(_BETS[:, None] * gains).sum(axis=1)
    most = float(logs.max())
    return most + math.log(float(np.exp(logs - most).mean()))
