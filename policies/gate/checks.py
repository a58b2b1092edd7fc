"""The gate's checks: small objects, each with a name, that turn figures into a statistic, a bound and words.

For a metric ``m`` and users ``u = 1..n`` let ``d_u = m_u(candidate) - m_u(compared)``, the same users and the
same cases for both, and ``L`` the lower bound of ``mean(d)`` by the paired bootstrap (``resampling``).

- *Not worse*: ``L > -margin * mean(m(compared))`` against the reference and against a fixed anchor, or n
  rounds could each lose a little. The burden of proof is the candidate's.
- *Better*: ``L > 0`` against the reference on at least one judged metric, at ``confidence`` shared over the
  metrics (Bonferroni). A candidate that is only not worse is held: promoting noise is a random walk.
- Coverage, concentration, validity and latency must not fall away.
- Off-policy: what sampled slates say; silent where they are too few to say anything.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..settings import GateSettings
from .figures import WORDS, Check, GateInput, PolicyFigures, paired
from .resampling import Resampled

Compared = Literal["reference", "anchor"]


@dataclass(frozen=True)
class Trial:
    """What checks judge with: the settings, and the resamples that all of them share."""

    settings: GateSettings
    judged: tuple[str, ...]
    """Metrics with enough users."""
    resampled: Mapping[tuple[str, str], Resampled]
    """(metric, "reference" | "anchor" | slice) -> candidate less compared."""
    seed: int
    """For checks that draw numbers of their own: the same input and seed give the same decision."""


class GateCheck(Protocol):
    """One check. Own ones are found through the entry point group ``align3gr.gate_checks`` (``own``)."""

    @property
    def name(self) -> str:
        """What settings and decisions call it."""
        ...

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """The findings; none where there is nothing to judge. Pure."""
        ...


@dataclass(frozen=True)
class Validity:
    """Every list is complete, unique and eligible."""

    name: str = "validity"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:  # noqa: ARG002
        """One check."""
        value = given.candidate.validity
        words = (
            f"validity: {value:.2%} of the candidate's lists are complete, unique and eligible; must be 100%"
        )
        yield Check("validity", "validity", value, 1.0, value, value >= 1.0, words)


@dataclass(frozen=True)
class Coverage:
    """The lists reach about as much of the catalogue as the reference's."""

    name: str = "coverage"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check."""
        value, reference = given.candidate.coverage, given.reference.coverage
        bound = trial.settings.coverage_share * reference
        words = (
            f"coverage: the candidate recommends {value:.2%} of the catalogue, the reference "
            f"{reference:.2%}; must be at least {bound:.2%}"
        )
        yield Check("coverage", "coverage", value, bound, value - reference, value >= bound, words)


@dataclass(frozen=True)
class Concentration:
    """The lists are not given over to the most popular items."""

    name: str = "concentration"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check, none where it was not measured."""
        value, reference = given.candidate.concentration, given.reference.concentration
        if value is None or reference is None:
            return
        bound = reference + trial.settings.concentration_rise
        words = (
            f"popularity concentration: {value:.2%} of the candidate's recommendations go to the most "
            f"popular items, {reference:.2%} of the reference's; must be at most {bound:.2%}"
        )
        yield Check("concentration", "concentration", value, bound, value - reference, value <= bound, words)


@dataclass(frozen=True)
class Latency:
    """The candidate answers about as fast as the reference on the machine that judges.

    The two took turns on one batch, so that whatever else the machine does hits both alike; the statistic is
    the median of the ratios. The first
    adapter on a full policy takes a third to two thirds longer for being one.
    """

    name: str = "latency"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check, none where it was not measured or is not asked for."""
        factor = trial.settings.latency_factor
        turns = min(len(given.candidate.latency_ms), len(given.reference.latency_ms))
        if factor is None or not turns:
            return
        ours = np.array(given.candidate.latency_ms[:turns])
        theirs = np.array(given.reference.latency_ms[:turns])
        ratio = float(np.median(ours / theirs))
        words = (
            f"latency: {np.median(ours):.1f} ms a batch against {np.median(theirs):.1f} ms of the reference "
            f"on this machine, {ratio:.2f} times as long (median of {turns} turns); must be at most "
            f"{factor:g}"
        )
        value = float(np.median(ours) - np.median(theirs))
        yield Check("latency", "latency", ratio, factor, value, ratio <= factor, words)


@dataclass(frozen=True)
class NotWorse:
    """A judged metric has not fallen by more than its margin."""

    metric: str
    compared: Compared

    @property
    def name(self) -> str:
        """As ``slate_not_worse_than_anchor``."""
        return f"{self.metric}_not_worse_than_{self.compared}"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check, none without an anchor of its own."""
        other = given.reference if self.compared == "reference" else given.anchor
        if other is None:
            return
        ours, theirs = paired(self.metric, given.candidate, other)
        if len(ours) < 2:
            words = f"{WORDS[self.metric]}: no users in common with the {self.compared} {other.version}"
            yield Check(self.name, self.metric, float("-inf"), 0.0, float("nan"), False, words)
            return
        bound = -margin_of(self.metric, trial.settings) * float(theirs.mean())
        found = trial.resampled[self.metric, self.compared]
        statistic = found.lower(trial.settings.confidence)
        # A policy that equals one with mean 0 is not worse than it.
        passed = statistic > bound or (bound == 0.0 and statistic >= 0.0)
        words = (
            f"{WORDS[self.metric]}: {ours.mean():.4f} against {theirs.mean():.4f} of the {self.compared} "
            f"{other.version} over {len(ours)} users; lower bound of the difference {statistic:+.4f}, must "
            f"be above {bound:+.4f}"
        )
        yield Check(self.name, self.metric, statistic, bound, found.mean, bool(passed), words)


@dataclass(frozen=True)
class Better:
    """A judged metric has risen."""

    metric: str

    @property
    def name(self) -> str:
        """As ``slate_better``."""
        return f"{self.metric}_better"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check, of the role ``gain``."""
        found = trial.resampled[self.metric, "reference"]
        confidence = 1.0 - (1.0 - trial.settings.confidence) / len(trial.judged)
        statistic = found.lower(confidence)
        words = (
            f"{WORDS[self.metric]}: gain {found.mean:+.4f} over the reference {given.reference.version} over "
            f"{found.users} users; its lower bound {statistic:+.4f} must be above 0 on one metric"
        )
        yield Check(self.name, self.metric, statistic, 0.0, found.mean, statistic > 0.0, words, role="gain")


@dataclass(frozen=True)
class OffPolicy:
    """Sampled slates do not show that the candidate is worse.

    It refuses only where harm is established (the whole interval lies below minus the margin): such intervals
    are wide, and a check that asked for proof of the contrary would refuse nearly everything.
    """

    name: str = "off_policy"

    def judge(self, given: GateInput, trial: Trial) -> Iterable[Check]:
        """One check; none while the effective sample is too small."""
        found, least = given.off_policy, trial.settings.off_policy_min_effective
        if found is None or least is None or found.effective < least:
            return
        bound = -trial.settings.off_policy_margin * found.reference
        words = (
            f"off-policy ({found.estimator}): {found.difference:+.4f} liked places a slate against the "
            f"reference's {found.reference:.4f}, interval {found.low:+.4f} to {found.high:+.4f} from "
            f"{found.slates} sampled slates of {found.users} users, worth {found.effective:.0f}; its upper "
            f"end must be above {bound:+.4f}"
        )
        # Equal policies on slates without a like: 0 against 0.
        passed = found.high > bound or (bound == 0.0 and found.high >= 0.0)
        yield Check(self.name, "off_policy", found.high, bound, found.difference, passed, words)


def margin_of(metric: str, settings: GateSettings) -> float:
    """Loss tolerated in a metric, as a share of the compared policy's mean."""
    return settings.slate_margin if metric == "slate" else settings.full_margin


def differences(metric: str, candidate: PolicyFigures, other: PolicyFigures) -> np.ndarray | None:
    """float64[n_users] candidate less other, NaN without a case of both; none where one lacks the metric."""
    if metric not in candidate.per_user or metric not in other.per_user:
        return None
    return np.asarray(candidate.per_user[metric] - other.per_user[metric])
