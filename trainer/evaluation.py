"""What a policy is worth: ranking of the full catalogue, ranking within logged slates, coverage, validity.

One relevant item a case, so with ``r`` its place in the list (1 = first, infinity when it is not there)

    Recall@k = [r <= k]        NDCG@k = [r <= k] / log2(1 + r)

A user's figure is the mean over that user's cases; a policy's the mean over users. Seen items are left out of
the lists, or not: two columns that are never mixed (lab notes: leaving them out lifts every model). Within a
slate, the win rate is the share of (liked, other) pairs that log pi orders rightly, ties half.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from policies.gate import PolicyFigures
from policies.policy import Eligible, Policy, Recommendation, UserContext
from policies.prompt import answer_ids, prompts_ids
from policies.scoring import answer_log_probs, pack

Floats = npt.NDArray[np.float64]

CUTOFFS = (1, 5, 10, 20)
"""The k of Recall@k and NDCG@k, unless told otherwise."""

SLATES_AT_ONCE = 64
"""Slates scored in one forward pass; bounds memory, changes no result."""

POPULAR_SHARE = 0.01
"""The most popular items whose share of the recommendations is the concentration."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


@dataclass(frozen=True)
class RankingCase:
    """An item to be found in the whole catalogue."""

    user_id: str
    history: tuple[str, ...]
    """Item ids before it, oldest first."""
    target: str
    seen: frozenset[str] | None = None
    """What is left out of the list; none: the history."""


@dataclass(frozen=True)
class SlateCase:
    """A logged slate with the levels in force."""

    user_id: str
    history: tuple[str, ...]
    items: tuple[str, ...]
    levels: tuple[int | None, ...]
    """1 liked, 0 neutral, -1 disliked; none: nothing is known of it, it is left out."""


@dataclass(frozen=True)
class RankingFigures:
    """Full-catalogue ranking of one policy. Metric names: "recall@10", "ndcg@10", ..."""

    users: tuple[str, ...]
    """Distinct users of the cases, in order of first appearance."""
    per_user: Mapping[str, Floats]
    """Metric -> float64 [users]."""
    cases: int
    coverage: float
    """Share of the eligible catalogue that appears in some list, 0..1."""
    validity: float
    """Share of lists that are complete, unique, eligible and (where left out) unseen, 0..1."""
    concentration: float
    """Share of all places that go to the most popular 1% of items, 0..1."""
    seen_left_out: bool

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over users."""
        return {name: float(values.mean()) for name, values in self.per_user.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "users": len(self.users),
            "cases": self.cases,
            "seen_left_out": self.seen_left_out,
            **self.means,
            "coverage": self.coverage,
            "validity": self.validity,
            "concentration": self.concentration,
        }


def rank_catalogue(
    policy: Policy,
    cases: Sequence[RankingCase],
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    beam: int | None = None,
    eligible: Collection[str] | None = None,
    exclude_seen: bool = True,
    popular: Collection[str] | None = None,
    progress: Progress | None = None,
) -> RankingFigures:
    """Recommend for every case by ``Policy.recommend`` and find the targets.

    ``beam``: the policy's own by default, raised to the largest cutoff. ``popular``: the items that
    concentration counts; default the policy's most popular 1% of eligible items (pass one set to compare
    policies). A target that the codec does not know counts as not found.
    """
    allowed = policy.eligible(eligible)
    k = max(cutoffs)
    lists: list[list[Recommendation]] = []
    for start in range(0, len(cases), 256):
        users = [_context(case) for case in cases[start : start + 256]]
        lists += policy.recommend(users, k, beam=beam, eligible=allowed, exclude_seen=exclude_seen)
        if progress is not None:
            progress("ranking", len(lists), len(cases))
    return _figures(policy, cases, lists, cutoffs, allowed, exclude_seen, popular)


def popularity_baseline(
    popularity: Sequence[str],
    cases: Sequence[RankingCase],
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    exclude_seen: bool = True,
) -> dict[str, float]:
    """Metric -> mean over users, when everybody gets the most popular items (``popularity``: most first)."""
    ranks = []
    for case in cases:
        left_out = _context(case).seen if exclude_seen else frozenset()
        listed: list[str] = []
        for item in popularity:
            if item not in left_out:
                listed.append(item)
                if len(listed) == max(cutoffs):
                    break
        ranks.append(listed.index(case.target) + 1 if case.target in listed else np.inf)
    users, per_case = _metrics(cases, np.array(ranks, dtype=np.float64), cutoffs)
    return {name: float(values.mean()) for name, values in _by_user(users, cases, per_case).items()}


def win_rates(
    policy: Policy, slates: Sequence[SlateCase], *, progress: Progress | None = None
) -> dict[str, float]:
    """User -> mean win rate over that user's slates; users without a liked and another item are absent.

    Items without a level and items that the codec does not know are left out of their slate.
    """
    kept = [
        (case, items, liked)
        for case in slates
        for items, liked in [_known(policy, case)]
        if 0 < sum(liked) < len(liked)
    ]
    kept.sort(key=lambda entry: len(entry[0].history), reverse=True)  # rows of a batch of like length
    rates: dict[str, list[float]] = {}
    for start in range(0, len(kept), SLATES_AT_ONCE):
        part = kept[start : start + SLATES_AT_ONCE]
        scores = log_probs(policy, [(case.history, items) for case, items, _ in part])
        for (case, _, liked), row in zip(part, scores, strict=True):
            rates.setdefault(case.user_id, []).append(win_rate(row, np.array(liked)))
        if progress is not None:
            progress("slates", min(start + SLATES_AT_ONCE, len(kept)), len(kept))
    return {user: float(np.mean(values)) for user, values in rates.items()}


def win_rate(scores: Floats, liked: npt.NDArray[np.bool_]) -> float:
    """Share of pairs (liked, other) with score(liked) > score(other), ties half; [n], [n] -> 0..1."""
    difference = scores[liked][:, None] - scores[~liked][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


@torch.inference_mode()
def log_probs(policy: Policy, asked: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Floats]:
    """log pi of items given a history, for each (history, items); one forward pass, float64 [items] each."""
    tokens = policy.tokens
    batch = pack(
        prompts_ids(tokens, [history for history, _ in asked]),
        [[answer_ids(tokens, item) for item in items] for _, items in asked],
        tokens.pad,
    ).to(policy.device)
    scores = answer_log_probs(policy.model, batch).double().cpu().numpy()
    return [row[: len(items)] for row, (_, items) in zip(scores, asked, strict=True)]


def gate_figures(
    policy: Policy,
    slates: Sequence[SlateCase],
    ranking: Sequence[RankingCase],
    users: Sequence[str],
    *,
    k: int = 10,
    beam: int | None = None,
    eligible: Collection[str] | None = None,
    popular: Collection[str] | None = None,
    progress: Progress | None = None,
) -> PolicyFigures:
    """What the gate judges: ``slate`` (win rate) and ``full`` (NDCG@k) of each of ``users``; NaN: no case.

    Coverage, validity and concentration are those of one list a user: the last ranking case's, or, for a user
    with slates only, the one for the last slate's history.
    """
    rates = win_rates(policy, slates, progress=progress)
    ranked = (
        rank_catalogue(
            policy, ranking, cutoffs=(k,), beam=beam, eligible=eligible, popular=popular, progress=progress
        )
        if ranking
        else None
    )
    full = dict(zip(ranked.users, ranked.per_user[f"ndcg@{k}"].tolist(), strict=True)) if ranked else {}
    contexts = {case.user_id: RankingCase(case.user_id, case.history, "") for case in slates}
    contexts |= {case.user_id: case for case in ranking}
    allowed = policy.eligible(eligible)
    asked = [contexts[user] for user in users if user in contexts]
    lists = policy.recommend([_context(case) for case in asked], k, beam=beam, eligible=allowed)
    shape = _figures(policy, asked, lists, (k,), allowed, True, popular)
    return PolicyFigures(
        version=policy.version,
        per_user={
            "slate": np.array([rates.get(user, np.nan) for user in users], dtype=np.float64),
            "full": np.array([full.get(user, np.nan) for user in users], dtype=np.float64),
        },
        coverage=shape.coverage,
        validity=shape.validity,
        concentration=shape.concentration,
    )


def cases_of(slates: Any, ranking: Any) -> tuple[list[SlateCase], list[RankingCase]]:
    """Cases from the Arrow tables of ``features.cases``."""
    return (
        [
            SlateCase(row["user_id"], tuple(row["history"]), tuple(row["items"]), tuple(row["levels"]))
            for row in slates.select(["user_id", "history", "items", "levels"]).to_pylist()
        ],
        [
            RankingCase(row["user_id"], tuple(row["history"]), row["target"])
            for row in ranking.select(["user_id", "history", "target"]).to_pylist()
        ],
    )


def leave_one_out(
    histories: Mapping[str, Sequence[str]], *, back: int = 1
) -> Iterator[tuple[RankingCase, tuple[str, ...]]]:
    """(case, training history) of each user long enough: the item ``back`` from the end is the target.

    ``back`` 1 is the paper's test item, 2 its validation item; what comes after the target is not used.
    """
    for user, history in histories.items():
        if len(history) > back:
            before = tuple(history[: len(history) - back])
            yield RankingCase(user, before, history[-back]), before


def _context(case: RankingCase) -> UserContext:
    seen = frozenset(case.history) if case.seen is None else case.seen
    return UserContext(case.user_id, case.history, seen - {case.target})


def _known(policy: Policy, case: SlateCase) -> tuple[list[str], list[bool]]:
    pairs = [
        (item, level == 1)
        for item, level in zip(case.items, case.levels, strict=True)
        if level is not None and item in policy.codec.items
    ]
    return [item for item, _ in pairs], [liked for _, liked in pairs]


def _figures(
    policy: Policy,
    cases: Sequence[RankingCase],
    lists: Sequence[Sequence[Recommendation]],
    cutoffs: Sequence[int],
    allowed: Eligible,
    exclude_seen: bool,
    popular: Collection[str] | None,
) -> RankingFigures:
    k = max(cutoffs)
    items = [[one.item_id for one in listed] for listed in lists]
    ranks = np.array(
        [
            listed.index(case.target) + 1 if case.target in listed else np.inf
            for case, listed in zip(cases, items, strict=True)
        ],
        dtype=np.float64,
    )
    users, per_case = _metrics(cases, ranks, cutoffs)
    shown = {item for listed in items for item in listed}
    top = set(_most_popular(policy, allowed) if popular is None else popular)
    places = sum(len(listed) for listed in items)
    valid = [
        _is_valid(policy, listed, _context(case).seen if exclude_seen else frozenset(), allowed, k)
        for case, listed in zip(cases, items, strict=True)
    ]
    return RankingFigures(
        users=users,
        per_user=_by_user(users, cases, per_case),
        cases=len(cases),
        coverage=len(shown) / max(int(allowed.mask.sum()), 1),
        validity=float(np.mean(valid)) if valid else 1.0,
        concentration=sum(item in top for listed in items for item in listed) / max(places, 1),
        seen_left_out=exclude_seen,
    )


def _metrics(
    cases: Sequence[RankingCase], ranks: Floats, cutoffs: Sequence[int]
) -> tuple[tuple[str, ...], dict[str, Floats]]:
    """(distinct users, metric -> float64 [cases])."""
    per_case: dict[str, Floats] = {}
    for k in cutoffs:
        hit = ranks <= k
        per_case[f"recall@{k}"] = hit.astype(np.float64)
        per_case[f"ndcg@{k}"] = np.where(hit, 1.0 / np.log2(1.0 + ranks), 0.0)
    return tuple(dict.fromkeys(case.user_id for case in cases)), per_case


def _by_user(
    users: Sequence[str], cases: Sequence[RankingCase], per_case: Mapping[str, Floats]
) -> dict[str, Floats]:
    row = {user: i for i, user in enumerate(users)}
    owner = np.array([row[case.user_id] for case in cases], dtype=np.int64)
    counts = np.bincount(owner, minlength=len(users)) if len(cases) else np.ones(len(users))
    return {
        name: np.bincount(owner, weights=values, minlength=len(users)) / counts
        for name, values in per_case.items()
    }


def _is_valid(policy: Policy, items: Sequence[str], seen: Collection[str], allowed: Eligible, k: int) -> bool:
    rows = policy.codec.items
    eligible = int(allowed.mask.sum()) - sum(item in rows and bool(allowed.mask[rows[item]]) for item in seen)
    return (
        len(items) == min(k, eligible)
        and len(set(items)) == len(items)
        and all(item in rows and allowed.mask[rows[item]] and item not in seen for item in items)
    )


def _most_popular(policy: Policy, allowed: Eligible) -> list[str]:
    """The first 1% (at least one) of the eligible items by popularity: what a user nobody knows gets."""
    count = max(1, round(POPULAR_SHARE * int(allowed.mask.sum())))
    return [one.item_id for one in policy.recommend([UserContext("")], count, eligible=allowed)[0]]
