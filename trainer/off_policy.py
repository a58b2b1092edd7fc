"""Off-policy evaluation of policies on the log's sampled slates: cases in, figures out
(policies/off_policy.py).

What a user had met and what the history was are as of the request; what may be recommended is as of now,
since the log does not keep it. Slates of users of whose history a policy knows nothing are left out: both
would answer them by popularity, not by what they learned.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from policies.gate import OffPolicyFigures
from policies.off_policy import Evaluation, SlateLog, difference, evaluate, naive
from policies.policy import Policy, UserContext
from policies.propensity import slate_propensities

from .evaluation import Progress

GATE_ESTIMATOR = "dr"
AT_ONCE = 256
"""Slates asked about between two signs of progress."""


@dataclass(frozen=True)
class SampledCase:
    """One sampled slate."""

    user: UserContext
    items: tuple[str, ...]
    propensities: tuple[float, ...]
    liked: tuple[bool, ...]


@dataclass(frozen=True)
class OffPolicyReport:
    """Policies on the same slates."""

    slates: int
    users: int
    left_out: int
    """Slates of users of whose history one of the policies knows nothing."""
    logged: dict[str, float]
    """The naive mean of the logged slates: value, low, high."""
    versions: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]

    def difference(self, ours: int, theirs: int, estimator: str) -> dict[str, float]:
        """value, low, high of one policy less another."""
        return asdict(difference(self.evaluations[ours], self.evaluations[theirs], estimator))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; differences are the first policy less each later one."""
        rows = [
            {
                "policy": version,
                "effective": one.effective,
                **{name: asdict(estimate) for name, estimate in one.estimates.items()},
            }
            for version, one in zip(self.versions, self.evaluations, strict=True)
        ]
        apart = [
            {
                "of": f"{self.versions[0]} - {self.versions[other]}",
                **{name: self.difference(0, other, name) for name in self._common(other)},
            }
            for other in range(1, len(self.versions))
        ]
        return {
            "slates": self.slates,
            "users": self.users,
            "left_out": self.left_out,
            "logged": self.logged,
            "rows": rows,
            "differences": apart,
        }

    def _common(self, other: int) -> list[str]:
        return [name for name in self.evaluations[0].estimates if name in self.evaluations[other].estimates]


def sampled_cases(table: pa.Table) -> list[SampledCase]:
    """From the Arrow table of ``features.sampled_slates``."""
    return [
        SampledCase(
            UserContext(row["user_id"], tuple(row["history"]), frozenset(row["met"]) - set(row["items"])),
            tuple(row["items"]),
            tuple(row["propensities"]),
            tuple(row["liked"]),
        )
        for row in table.to_pylist()
    ]


def off_policy_report(
    policies: Sequence[Policy],
    cases: Sequence[SampledCase],
    *,
    eligible: Collection[str] | None,
    seed: int = 0,
    progress: Progress | None = None,
) -> OffPolicyReport | None:
    """Evaluate ``policies`` on the same slates; none where fewer than two users are left."""
    kept = [case for case in cases if all(policy.tokens.known(case.user.history) for policy in policies)]
    if len({case.user.user_id for case in kept}) < 2:
        return None
    names: dict[str, int] = {}
    drawn = [_drawn(policy, kept, eligible, seed, progress) for policy in policies]
    slates = _log(kept, names)
    evaluations = []
    for policy, lists in zip(policies, drawn, strict=True):
        allowed = policy.eligible(eligible)
        target = slate_propensities(
            policy, [case.user for case in kept], [case.items for case in kept], eligible=allowed
        )
        evaluations.append(evaluate(slates, target, drawn=_numbers(lists, names), seed=seed))
    return OffPolicyReport(
        slates=len(kept),
        users=int(slates.users.max()) + 1,
        left_out=len(cases) - len(kept),
        logged=asdict(naive(slates)),
        versions=tuple(policy.version for policy in policies),
        evaluations=tuple(evaluations),
    )


def gate_evidence(report: OffPolicyReport | None) -> OffPolicyFigures | None:
    """What the gate's check is given: the first policy, the candidate, less the second, the reference."""
    if report is None:
        return None
    candidate, reference = report.evaluations
    if GATE_ESTIMATOR not in candidate.estimates or GATE_ESTIMATOR not in reference.estimates:
        return None
    apart = report.difference(0, 1, GATE_ESTIMATOR)
    return OffPolicyFigures(
        estimator="doubly robust",
        slates=report.slates,
        users=report.users,
        effective=min(candidate.effective, reference.effective),
        difference=apart["value"],
        low=apart["low"],
        high=apart["high"],
        reference=reference.estimates[GATE_ESTIMATOR].value,
    )


def _drawn(
    policy: Policy,
    cases: Sequence[SampledCase],
    eligible: Collection[str] | None,
    seed: int,
    progress: Progress | None,
) -> list[list[str]]:
    """One slate of the policy for each case, as long as the logged one: what the reward model is asked."""
    allowed = policy.eligible(eligible)
    longest = max(len(case.items) for case in cases)
    found: list[list[str]] = []
    for start in range(0, len(cases), AT_ONCE):
        part = cases[start : start + AT_ONCE]
        # The noise of a sample is the user's own: two slates of one user need two seeds.
        users = [
            UserContext(f"{case.user.user_id}#{start + place}", case.user.history, case.user.seen)
            for place, case in enumerate(part)
        ]
        lists = policy.sample(users, longest, seed=seed, eligible=allowed)
        found += [
            [one.item_id for one in listed[: len(case.items)]]
            for case, listed in zip(part, lists, strict=True)
        ]
        if progress is not None:
            progress("off-policy", len(found), len(cases))
    return found


def _log(cases: Sequence[SampledCase], names: dict[str, int]) -> SlateLog:
    people: dict[str, int] = {}
    longest = max(len(case.items) for case in cases)
    rewards, logged = np.zeros((len(cases), longest)), np.full((len(cases), longest), np.nan)
    for row, case in enumerate(cases):
        rewards[row, : len(case.items)] = case.liked
        logged[row, : len(case.items)] = case.propensities
    users = [people.setdefault(case.user.user_id, len(people)) for case in cases]
    return SlateLog(np.array(users), _numbers([case.items for case in cases], names), rewards, logged)


def _numbers(lists: Sequence[Sequence[str]], names: dict[str, int]) -> np.ndarray:
    """int64 [n, longest], -1 fills; ``names`` grows."""
    found = np.full((len(lists), max(len(listed) for listed in lists)), -1, dtype=np.int64)
    for row, listed in enumerate(lists):
        found[row, : len(listed)] = [names.setdefault(item, len(names)) for item in listed]
    return found
