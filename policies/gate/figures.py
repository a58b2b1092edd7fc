"""What the gate is given, and the shape of what it finds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import PoliciesError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

WORDS = {
    "slate": "ranking within the slate (liked items above the others of the same logged slate)",
    "full": "NDCG@10 over the full catalogue (organic and sampled traffic)",
}
"""The judged metrics, in words."""


@dataclass(frozen=True)
class PolicyFigures:
    """What evaluation measured of one policy on the gate users."""

    version: str
    per_user: Mapping[str, Floats]
    """Metric name (a key of WORDS, or ``own:NAME``) -> float64[n_users], NaN: a user without a case of it."""
    coverage: float
    """Share of the eligible catalogue that appears in the gate users' lists, 0..1."""
    validity: float
    """Share of recommended lists that are complete, unique and eligible, 0..1."""
    concentration: float | None = None
    """Share of the recommendations that go to the most popular 1% of items, 0..1."""
    item_slices: Mapping[str, Floats] = field(default_factory=dict)
    """``metric/slice`` (as ``full/young items``) -> float64[n_users] over the cases whose target is in the
    slice, NaN: none of this user's."""
    latency_ms: tuple[float, ...] = ()
    """Milliseconds of ``Policy.recommend`` for one and the same batch, over and over; the n-th of the
    candidate was taken right after the n-th of the reference."""


@dataclass(frozen=True)
class OffPolicyFigures:
    """What sampled slates say of candidate less reference (policies/off_policy.py)."""

    estimator: str
    slates: int
    users: int
    effective: float
    """Effective number of slates under the candidate's weights, (sum w)^2 / sum w^2."""
    difference: float
    """Liked places a slate, candidate less reference."""
    low: float
    high: float
    """Ends of the 95% interval of the difference."""
    reference: float
    """Liked places a slate of the reference."""


@dataclass(frozen=True)
class GateInput:
    """Candidate, reference and anchor measured on the same users in the same order."""

    users: tuple[str, ...]
    candidate: PolicyFigures
    reference: PolicyFigures
    anchor: PolicyFigures | None = None
    """None where the anchor is the reference itself."""
    user_slices: Mapping[str, Bools] = field(default_factory=dict)
    """Slice (as ``new users``) -> bool[n_users]."""
    off_policy: OffPolicyFigures | None = None
    """None where there are no sampled slates of gate users."""

    def require_same_users(self) -> None:
        """Raises PoliciesError when the arrays do not have one value per user."""
        policies = [self.candidate, self.reference, *([self.anchor] if self.anchor else [])]
        for policy in policies:
            for metric, values in {**policy.per_user, **policy.item_slices}.items():
                if values.shape != (len(self.users),):
                    raise PoliciesError(
                        f"gate: {metric} of {policy.version} has shape {values.shape} for {len(self.users)} "
                        "users; evaluate all policies on the same users"
                    )
        for name, members in self.user_slices.items():
            if members.shape != (len(self.users),):
                raise PoliciesError(
                    f"gate: slice {name} has shape {members.shape} for {len(self.users)} users; "
                    "it needs one value a user"
                )


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
    role: Literal["guard", "gain"] = "guard"
    """A guard must pass; of the gains one must."""


def paired(metric: str, candidate: PolicyFigures, other: PolicyFigures) -> tuple[Floats, Floats]:
    """Both policies' values on the users who have a case in both: float64[m], float64[m]."""
    empty = np.empty(0)
    ours, theirs = candidate.per_user.get(metric, empty), other.per_user.get(metric, empty)
    if len(ours) != len(theirs):
        return empty, empty
    both = ~(np.isnan(ours) | np.isnan(theirs))
    return ours[both], theirs[both]
