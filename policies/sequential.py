"""Confidence sequences: an interval for a mean that may be looked at after every batch, for ever.

A 95% interval that is looked at often and acted on the first time it excludes zero is wrong far more often
than one time in twenty. A confidence sequence holds at all times together: with probability ``1 - alpha`` the
true mean lies in *every* interval of the run (Howard, Ramdas, McAuliffe and Sekhon, Annals of Statistics
2021). For observations ``X_i`` in ``[a, b]`` with ``c = b - a``, predictions ``P_i`` made before ``X_i`` (the
mean so far) and the variance process ``V_t = sum_i (X_i - P_i)^2``, their theorem 4 gives

    | mean of X_1..X_t  -  mean of their conditional means |  <  u(V_t) / t        for all t at once

for any sub-exponential uniform boundary ``u`` of scale ``c`` with crossing probability ``alpha / 2`` a side.
``u`` is here their gamma-exponential mixture (proposition 9): exact at every sample size, and within a few
per cent of the normal mixture once the variance process is long. All that a sequence knows are three sums, so
it survives a kill: store ``sums`` and build it again.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import gammainc, gammaln

from .errors import PoliciesError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """What a sequence has seen, in the units of the observations."""

    n: int = 0
    total: float = 0.0
    """Sum of the observations."""
    spread: float = 0.0
    """V_t: sum of squared distances from the mean of the observations before."""

    def as_dict(self) -> dict[str, float]:
        """For JSON; ``Sums(**it)`` gives the same sums back, to the last bit."""
        return asdict(self)


class ConfidenceSequence:
    """Always-valid interval for the mean of bounded observations that arrive in batches.

    The order of the observations must not depend on their values (take them as they arrive, or by user id).
    ``low`` and ``high`` may be read at any time and acted on at once; stopping early, late, or never does not
    change what they promise. Each side alone holds with ``1 - alpha / 2``.
    """

    def __init__(
        self,
        alpha: float = 0.05,
        bounds: tuple[float, float] = (-1.0, 1.0),
        *,
        tightest_at: int = 1000,
        sums: Sums | None = None,
    ) -> None:
        """``bounds``: the least and the largest value an observation can have.

        ``tightest_at``: number of observations at which the interval is to be at its best compared with a
        fixed-sample one (an order of magnitude is enough); it must not be chosen after looking.
        ``sums``: what an earlier sequence with the same settings had seen.
        Raises PoliciesError for settings that make no sense.
        """
        if not 0.0 < alpha < 1.0:
            raise PoliciesError(f"a confidence sequence needs alpha between 0 and 1, not {alpha}")
        low, high = bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise PoliciesError(f"a confidence sequence needs bounds with low < high, not {low} and {high}")
        if tightest_at < 1:
            raise PoliciesError(f"tightest_at is a number of observations, not {tightest_at}")
        self.alpha, self.bounds, self.sums = alpha, (float(low), float(high)), sums or Sums()
        # Everything below is in units where c = 1. The standard deviation is guessed as a sixth of the range
        # (differences of two shares in -1..1: a third); rho as the best one for the normal mixture at that
        # intrinsic time (Howard et al. 2021, section 3.5).
        log_alpha = math.log(2.0 / alpha)
        self._rho = (tightest_at / 36.0) / (2.0 * log_alpha + math.log1p(2.0 * log_alpha))

    def update(self, values: Iterable[float]) -> "ConfidenceSequence":
        """Take one batch of observations, in their order. Gives the sequence itself.

        Raises PoliciesError for a value that is not finite or outside of the bounds; nothing of the batch is
        taken then.
        """
        batch = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
        if not batch.size:
            return self
        low, high = self.bounds
        if not (np.isfinite(batch).all() and batch.min() >= low and batch.max() <= high):
            raise PoliciesError(
                f"observations must lie between {low} and {high}; clip them, or widen the bounds before the "
                "first look"
            )
        before = self.sums
        running = before.total + np.concatenate([[0.0], np.cumsum(batch)[:-1]])
        counts = before.n + np.arange(len(batch))
        predicted = np.where(counts > 0, running / np.maximum(counts, 1), (low + high) / 2)
        self.sums = Sums(
            n=before.n + len(batch),
            total=before.total + float(batch.sum()),
            spread=before.spread + float(((batch - predicted) ** 2).sum()),
        )
        return self

    @property
    def n(self) -> int:
        """Observations so far."""
        return self.sums.n

    @property
    def mean(self) -> float:
        """Of the observations so far; the middle of the bounds before the first."""
        return self.sums.total / self.sums.n if self.sums.n else sum(self.bounds) / 2

    @property
    def low(self) -> float:
        """Lower end of the interval now."""
        return max(self.bounds[0], self.mean - self._half_width())

    @property
    def high(self) -> float:
        """Upper end of the interval now."""
        return min(self.bounds[1], self.mean + self._half_width())

    def _half_width(self) -> float:
        if not self.sums.n:
            return math.inf
        scale = self.bounds[1] - self.bounds[0]
        boundary = _gamma_exponential(self.sums.spread / scale**2, self.alpha / 2, self._rho)
        return scale * boundary / self.sums.n


def paired_differences(treated: npt.ArrayLike, control: npt.ArrayLike) -> Floats:
    """One difference for each treated observation: it, less the mean of its own share of the control group.

    Both in order of arrival; the control group is cut into as many runs of equal length as there are treated
    observations (what is left over at the end is not used). Every difference has the same expectation, mean
    of treated less mean of control, and none shares an observation with another, so a ConfidenceSequence may
    take them. Gives float64 [len(treated)], or none where the control group is the smaller one.
    """
    ours, theirs = np.asarray(treated, dtype=np.float64), np.asarray(control, dtype=np.float64)
    each = len(theirs) // len(ours) if len(ours) else 0
    if not each:
        return np.empty(0)
    return np.asarray(ours - theirs[: each * len(ours)].reshape(len(ours), each).mean(axis=1))


def _gamma_exponential(v: float, alpha: float, rho: float) -> float:
    """The least s with log m(s, v) >= log(1 / alpha), for c = 1 (Howard et al. 2021, proposition 9)."""
    wanted = -math.log(alpha)
    prior = rho * math.log(rho) - float(gammaln(rho)) - math.log(float(gammainc(rho, rho)))
    posterior = float(gammaln(v + rho))

    def log_mixture(s: float) -> float:
        x = s + v + rho
        inside = math.log(float(gammainc(v + rho, x)))
        return prior + posterior + inside - (v + rho) * math.log(x) + s + v

    high = 1.0 + math.sqrt(v + 1.0)
    while log_mixture(high) < wanted:
        high *= 2.0
    low = 0.0
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if log_mixture(middle) < wanted else (low, middle)
    return high
