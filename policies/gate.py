"""The gate between a candidate policy and its promotion: figures in, one explained decision out.

For a metric ``m`` and users ``u = 1..n`` let ``d_u = m_u(candidate) - m_u(compared)``, the same users and the
same cases for both. The paired bootstrap resamples users with replacement and takes the lower
``1 - confidence`` quantile of ``mean(d)`` as lower bound ``L`` (Efron & Tibshirani 1993, ch. 13).

- *Not worse*: ``L > -margin * mean(m(compared))`` against the reference and against a fixed anchor, or n
  rounds could each lose a little.
- *Better*: ``L > 0`` against the reference on at least one judged metric, at ``confidence`` shared over the
  metrics (Bonferroni). A candidate that is only not worse is held: promoting noise is a random walk.
- Coverage, validity and concentration must not fall away; too few users hold.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import PoliciesError
from .settings import GateSettings

Floats = NDArray[np.float64]
Outcome = Literal["promote", "refuse", "hold"]

WORDS = {
    "slate": "ranking within the slate (liked items above the others of the same logged slate)",
    "full": "NDCG@10 over the full catalogue (organic and sampled traffic)",
}
"""The judged metrics, in words."""

# Resampled user indices held at once: 4M int64 are 32 MB.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class PolicyFigures:
    """What evaluation measured of one policy on the gate users."""

    version: str
    per_user: Mapping[str, Floats]
    """Metric name (a key of WORDS) -> float64[n_users], NaN for a user without a case of that metric."""
    coverage: float
    """Share of the eligible catalogue that appears in the gate users' lists, 0..1."""
    validity: float
    """Share of recommended lists that are complete, unique and eligible, 0..1."""
    concentration: float | None = None
    """Share of the recommendations that go to the most popular 1% of items, 0..1."""


@dataclass(frozen=True)
class GateInput:
    """Candidate, reference and anchor measured on the same users in the same order."""

    users: tuple[str, ...]
    candidate: PolicyFigures
    reference: PolicyFigures
    anchor: PolicyFigures | None = None
    """None where the anchor is the reference itself."""


@dataclass(frozen=True)
class Check:
    """One named requirement: it passes when ``statistic`` is on the right side of ``bound``."""

    name: str
    metric: str
    statistic: float
    bound: float
    value: float
    """The plain estimate behind the statistic (for example the mean difference)."""
    passed: bool
    words: str


@dataclass(frozen=True)
class Decision:
    """What the gate says, and all it looked at."""

    outcome: Outcome
    why: str
    checks: tuple[Check, ...]
    users: int
    """Gate users with a case of at least one judged metric."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def as_dict(self) -> dict[str, Any]:
        """For policy manifests, MLflow and ``--json``."""
        return asdict(self)


def decide(given: GateInput, settings: GateSettings, *, seed: int) -> Decision:
    """Judge ``given.candidate``: promote, refuse (a check failed, named in ``why``) or hold.

    Pure: the same input, settings and seed give the same decision.
    Raises PoliciesError when the arrays do not have one value per user.
    """
    _require_same_users(given)
    random = np.random.default_rng(seed)
    judged, unjudged = _judged_metrics(given, settings)
    checks = [_validity(given), _coverage(given, settings)]
    concentration = _concentration(given, settings)
    if concentration is not None:
        checks.append(concentration)
    compared = [("reference", given.reference)]
    if given.anchor is not None:
        compared.append(("anchor", given.anchor))
    for metric in judged:
        for name, other in compared:
            checks.append(_not_worse(metric, name, given.candidate, other, settings, random))
    gains = [_better(metric, given, settings, len(judged), random) for metric in judged]
    return _decision(given, checks, gains, unjudged, settings)


def lower_bound(
    differences: Floats, *, confidence: float, resamples: int, random: np.random.Generator
) -> float:
    """Bootstrap lower bound of the mean of ``differences`` [n] at one-sided ``confidence``."""
    n = len(differences)
    if not np.any(differences != differences[0]):
        return float(differences[0])
    means = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        means[start : start + rows] = differences[random.integers(n, size=(rows, n))].mean(axis=1)
    return float(np.quantile(means, 1.0 - confidence))


def _require_same_users(given: GateInput) -> None:
    policies = [given.candidate, given.reference, *([given.anchor] if given.anchor else [])]
    for policy in policies:
        for metric, values in policy.per_user.items():
            if values.shape != (len(given.users),):
                raise PoliciesError(
                    f"gate: {metric} of {policy.version} has shape {values.shape} for {len(given.users)} "
                    "users; evaluate all policies on the same users"
                )


def _pair(metric: str, candidate: PolicyFigures, other: PolicyFigures) -> tuple[Floats, Floats]:
    """Both policies' values on the users who have a case in both: float64[m], float64[m]."""
    empty = np.empty(0)
    ours, theirs = candidate.per_user.get(metric, empty), other.per_user.get(metric, empty)
    if len(ours) != len(theirs):
        return empty, empty
    both = ~(np.isnan(ours) | np.isnan(theirs))
    return ours[both], theirs[both]


def _judged_metrics(given: GateInput, settings: GateSettings) -> tuple[list[str], dict[str, int]]:
    judged: list[str] = []
    unjudged: dict[str, int] = {}
    for metric in WORDS:
        users = len(_pair(metric, given.candidate, given.reference)[0])
        if users >= settings.min_users:
            judged.append(metric)
        else:
            unjudged[metric] = users
    return judged, unjudged


def _not_worse(
    metric: str,
    name: str,
    candidate: PolicyFigures,
    other: PolicyFigures,
    settings: GateSettings,
    random: np.random.Generator,
) -> Check:
    ours, theirs = _pair(metric, candidate, other)
    share = settings.slate_margin if metric == "slate" else settings.full_margin
    if len(ours) < 2:
        return Check(
            f"{metric}_not_worse_than_{name}", metric, float("-inf"), 0.0, float("nan"), False,
            f"{WORDS[metric]}: no users in common with the {name} {other.version}",
        )  # fmt: skip
    bound = -share * float(theirs.mean())
    differences = ours - theirs
    statistic = lower_bound(
        differences, confidence=settings.confidence, resamples=settings.resamples, random=random
    )
    # A policy that equals one with mean 0 is not worse than it.
    passed = statistic > bound or (bound == 0.0 and statistic >= 0.0)
    words = (
        f"{WORDS[metric]}: {ours.mean():.4f} against {theirs.mean():.4f} of the {name} {other.version} over "
        f"{len(ours)} users; lower bound of the difference {statistic:+.4f}, must be above {bound:+.4f}"
    )
    return Check(
        f"{metric}_not_worse_than_{name}",
        metric,
        statistic,
        bound,
        float(differences.mean()),
        bool(passed),
        words,
    )


def _better(
    metric: str, given: GateInput, settings: GateSettings, metrics: int, random: np.random.Generator
) -> Check:
    ours, theirs = _pair(metric, given.candidate, given.reference)
    differences = ours - theirs
    confidence = 1.0 - (1.0 - settings.confidence) / metrics
    statistic = lower_bound(differences, confidence=confidence, resamples=settings.resamples, random=random)
    words = (
        f"{WORDS[metric]}: gain {differences.mean():+.4f} over the reference {given.reference.version} over "
        f"{len(ours)} users; its lower bound {statistic:+.4f} must be above 0 on one metric"
    )
    return Check(
        f"{metric}_better", metric, statistic, 0.0, float(differences.mean()), statistic > 0.0, words
    )


def _validity(given: GateInput) -> Check:
    value = given.candidate.validity
    words = f"validity: {value:.2%} of the candidate's lists are complete, unique and eligible; must be 100%"
    return Check("validity", "validity", value, 1.0, value, value >= 1.0, words)


def _coverage(given: GateInput, settings: GateSettings) -> Check:
    value, reference = given.candidate.coverage, given.reference.coverage
    bound = settings.coverage_share * reference
    words = (
        f"coverage: the candidate recommends {value:.2%} of the catalogue, the reference {reference:.2%}; "
        f"must be at least {bound:.2%}"
    )
    return Check("coverage", "coverage", value, bound, value - reference, value >= bound, words)


def _concentration(given: GateInput, settings: GateSettings) -> Check | None:
    value, reference = given.candidate.concentration, given.reference.concentration
    if value is None or reference is None:
        return None
    bound = reference + settings.concentration_rise
    words = (
        f"popularity concentration: {value:.2%} of the candidate's recommendations go to the most popular "
        f"items, {reference:.2%} of the reference's; must be at most {bound:.2%}"
    )
    return Check("concentration", "concentration", value, bound, value - reference, value <= bound, words)


def _decision(
    given: GateInput,
    checks: list[Check],
    gains: list[Check],
    unjudged: Mapping[str, int],
    settings: GateSettings,
) -> Decision:
    counted = [~np.isnan(values) for metric, values in given.candidate.per_user.items() if metric in WORDS]
    users = int(np.logical_or.reduce(counted).sum()) if counted else 0
    failed = [check for check in checks if not check.passed]
    missing = [metric for metric in settings.required if metric in unjudged or metric not in WORDS]
    invalid = [check for check in failed if check.name == "validity"]
    outcome: Outcome
    if invalid or (failed and gains and not missing):
        outcome, why = "refuse", "; ".join(check.words for check in failed)
    elif missing or not gains:
        few = ", ".join(f"{metric}: {unjudged.get(metric, 0)}" for metric in (missing or WORDS))
        outcome = "hold"
        why = f"too few gate users to judge ({few}; {settings.min_users} needed): wait for more feedback"
    elif not any(gain.passed for gain in gains):
        outcome, why = "hold", "no better than the reference: " + "; ".join(gain.words for gain in gains)
    else:
        outcome = "promote"
        why = "; ".join(gain.words for gain in gains if gain.passed)
    return Decision(outcome, why, (*checks, *gains), users)
