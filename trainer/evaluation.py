"""What a policy is worth: the full catalogue ranked for cases with one item to be found, by beam search.

Recall and NDCG are those of trainer.metrics; a user's figure is the mean over that user's cases, a policy's
the mean over users. Seen items are left out of the lists, or not: two columns that are never mixed (leaving
them out lifts every model). A beam of B prefixes finds at most B items, so it answers cutoffs up to B and no
others: Recall@50 is never read off a beam of 20 (``beam_plan``).
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from policies.policy import Eligible, Policy, Recommendation, UserContext

from .cases import RankingCase, context_of
from .metrics import CUTOFFS, Floats, IntArray, ListShape, Places, per_case

Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


@dataclass(frozen=True)
class Latency:
    """Time that ``Policy.recommend`` took, batch by batch; the first batch, a warm-up, is not counted where
    there are others."""

    batch: int
    """Users a batch."""
    users_per_s: float
    p50_ms: float
    """Median time of a batch."""
    p95_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float], users: Sequence[int]) -> "Latency":
        """From the seconds and users of each batch, in order."""
        took, sizes = (np.array(seconds), np.array(users)) if len(seconds) else (np.ones(1), np.zeros(1))
        kept = slice(1 if len(took) > 1 else 0, None)
        p50, p95 = np.quantile(took[kept] * 1000, [0.5, 0.95])
        return cls(int(sizes.max()), float(sizes[kept].sum() / took[kept].sum()), float(p50), float(p95))


@dataclass(frozen=True)
class RankingFigures:
    """Full-catalogue ranking of one policy. Metric names: "recall@10", "ndcg@10", ..."""

    users: tuple[str, ...]
    """Distinct users of the cases, in order of first appearance."""
    per_user: Mapping[str, Floats]
    """Metric -> float64 [users]."""
    cases: int
    shape: ListShape
    """Coverage, concentration and popularity of the lists."""
    validity: float
    """Share of lists that are complete, unique, eligible and (where left out) unseen, 0..1."""
    seen_left_out: bool
    beam: int
    """Prefixes kept at each level."""
    latency: Latency
    per_case: Mapping[str, Floats] = field(default_factory=dict)
    """Metric -> float64 [cases], in the order of the cases."""

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over users."""
        return {name: float(values.mean()) for name, values in self.per_user.items()}

    @property
    def coverage(self) -> float:
        """Share of the eligible catalogue that appears in some list, 0..1."""
        return self.shape.coverage

    @property
    def concentration(self) -> float:
        """Share of all places that go to the most popular 1% of items, 0..1."""
        return self.shape.concentration

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "users": len(self.users),
            "cases": self.cases,
            "seen_left_out": self.seen_left_out,
            "beam": self.beam,
            **self.means,
            **asdict(self.shape),
            "validity": self.validity,
            "latency": asdict(self.latency),
        }


def beam_plan(beams: Sequence[int], cutoffs: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """(beam, the cutoffs it answers): each beam answers the k it can hold, and where none of them can hold
    the largest k, a further beam of exactly that k answers all. Narrowest first."""
    wanted = sorted(set(beams))
    if not any(beam >= max(cutoffs) for beam in wanted):
        wanted.append(max(cutoffs))
    plan = [(beam, tuple(sorted(k for k in set(cutoffs) if k <= beam))) for beam in wanted]
    return [(beam, ks) for beam, ks in plan if ks]


def rank_catalogue(
    policy: Policy,
    cases: Sequence[RankingCase],
    *,
    cutoffs: Sequence[int] | None = None,
    beam: int | None = None,
    eligible: Collection[str] | None = None,
    exclude_seen: bool = True,
    popular: Collection[str] | None = None,
    popularity: Sequence[str] | None = None,
    depth: int | None = None,
    progress: Progress | None = None,
) -> RankingFigures:
    """Recommend for every case by ``Policy.recommend`` and find the targets.

    ``cutoffs``: default those of CUTOFFS that the beam holds. ``beam``: the policy's own by default, raised
    to the largest cutoff. ``popular``: the items that concentration counts; default the first 1% of
    ``popularity``, which is the eligible items, most popular first, and by default the policy's own (pass one
    to compare policies). ``depth``: places of a list that its shape is taken over; none: all. A target that
    the codec does not know counts as not found.
    """
    allowed = policy.eligible(eligible)
    own = policy.settings.beam if beam is None else beam
    cutoffs = tuple(k for k in CUTOFFS if k <= own) if cutoffs is None else cutoffs
    k = max(cutoffs)
    # Batches of like prompt length, as a server fills them, timed one by one.
    order = sorted(range(len(cases)), key=lambda place: len(cases[place].history))
    lists: list[list[Recommendation]] = [[] for _ in cases]
    seconds, sizes = [], []
    for start in range(0, len(cases), policy.settings.batch):
        places = order[start : start + policy.settings.batch]
        users = [context_of(cases[place]) for place in places]
        began = time.perf_counter()
        found = policy.recommend(users, k, beam=beam, eligible=allowed, exclude_seen=exclude_seen)
        seconds.append(time.perf_counter() - began)
        sizes.append(len(users))
        for place, one in zip(places, found, strict=True):
            lists[place] = one
        if progress is not None:
            progress("ranking", min(start + len(places), len(cases)), len(cases))
    items = [[one.item_id for one in listed] for listed in lists]
    ranks = np.array(
        [
            listed.index(case.target) + 1 if case.target in listed else np.inf
            for case, listed in zip(cases, items, strict=True)
        ],
        dtype=np.float64,
    )
    names = tuple(dict.fromkeys(case.user_id for case in cases))
    each = per_case(Places.of_ranks(ranks), cutoffs)
    return RankingFigures(
        users=names,
        per_user=_by_user(names, cases, each),
        cases=len(cases),
        shape=shape_of(policy, items, allowed, popular, popularity, depth or k),
        validity=validity_of(policy, cases, items, allowed, exclude_seen, k),
        seen_left_out=exclude_seen,
        beam=max(own, k),
        latency=Latency.of(seconds, sizes),
        per_case=each,
    )


def popularity_baseline(
    popularity: Sequence[str],
    cases: Sequence[RankingCase],
    *,
    cutoffs: Sequence[int] = (1, 5, 10, 20),
    exclude_seen: bool = True,
) -> dict[str, float]:
    """Metric -> mean over users, when everybody gets the most popular items (``popularity``: most first)."""
    ranks = []
    for case in cases:
        left_out = context_of(case).seen if exclude_seen else frozenset()
        listed = islice((item for item in popularity if item not in left_out), max(cutoffs))
        ranks.append(next((place for place, item in enumerate(listed, 1) if item == case.target), np.inf))
    users = tuple(dict.fromkeys(case.user_id for case in cases))
    places = Places.of_ranks(np.array(ranks, dtype=np.float64))
    by_user = _by_user(users, cases, per_case(places, cutoffs))
    return {name: float(values.mean()) for name, values in by_user.items()}


def shape_of(
    policy: Policy,
    lists: Sequence[Sequence[str]],
    allowed: Eligible,
    popular: Collection[str] | None,
    popularity: Sequence[str] | None,
    depth: int,
) -> ListShape:
    """Coverage, concentration and popularity of ``lists`` (item ids, best first) over ``depth`` places.

    ``popular`` and ``popularity`` as in ``rank_catalogue``.
    """
    rows = policy.codec.items
    shown = np.full((len(lists), depth), -1, dtype=np.int64)
    for place, listed in enumerate(lists):
        shown[place, : len(listed[:depth])] = [rows[item] for item in listed[:depth]]
    if popularity is None:
        everybody = policy.recommend([UserContext("")], len(rows), eligible=allowed)[0]
        popularity = [one.item_id for one in everybody]
    named = np.array([rows[item] for item in popularity if item in rows], dtype=np.int64)
    named = named[allowed.mask[named]]
    rest = allowed.mask.copy()
    rest[named] = False
    return ListShape.of(
        shown,
        np.concatenate([named, np.flatnonzero(rest)]),
        depth=depth,
        popular=None if popular is None else _rows(popular, rows),
    )


def validity_of(
    policy: Policy,
    cases: Sequence[RankingCase],
    lists: Sequence[Sequence[str]],
    allowed: Eligible,
    exclude_seen: bool,
    k: int,
) -> float:
    """Share of lists that are as long as they can be, unique, eligible and unseen; 1 without any list."""
    rows, mask, eligible = policy.codec.items, allowed.mask, int(allowed.mask.sum())
    valid = []
    for case, items in zip(cases, lists, strict=True):
        seen = context_of(case).seen if exclude_seen else frozenset()
        left = eligible - sum(item in rows and bool(mask[rows[item]]) for item in seen)
        valid.append(
            len(items) == min(k, left)
            and len(set(items)) == len(items)
            and all(item in rows and mask[rows[item]] and item not in seen for item in items)
        )
    return float(np.mean(valid)) if valid else 1.0


def _by_user(
    users: Sequence[str], cases: Sequence[RankingCase], values_of: Mapping[str, Floats]
) -> dict[str, Floats]:
    row = {user: i for i, user in enumerate(users)}
    owner = np.array([row[case.user_id] for case in cases], dtype=np.int64)
    counts = np.bincount(owner, minlength=len(users)) if len(cases) else np.ones(len(users))
    return {
        name: np.bincount(owner, weights=values, minlength=len(users)) / counts
        for name, values in values_of.items()
    }


def _rows(items: Collection[str], rows: Mapping[str, int]) -> IntArray:
    return np.array([rows[item] for item in items if item in rows], dtype=np.int64)
