"""What the gate judges of one policy: the win rate within logged slates and the full catalogue ranked,
user by user, with the shape of the lists that the users would get."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from policies.gate import PolicyFigures
from policies.policy import Policy

from .cases import RankingCase, context_of, list_cases
from .evaluation import Progress, rank_catalogue, shape_of, validity_of
from .slates import SlateCase, judged_slates, mean_win_rates
from .slicing import sliced

Measure = Callable[[Policy, Mapping[str, Sequence[str]]], Mapping[str, float]]
"""An own check's ``measure``: (policy, user -> item ids of the list, best first) -> user -> value."""


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
    parts: Mapping[str, Collection[str]] | None = None,
    measures: Mapping[str, Measure] | None = None,
    progress: Progress | None = None,
) -> PolicyFigures:
    """What the gate judges: ``slate`` (win rate) and ``full`` (NDCG@k) of each of ``users``; NaN: no case.

    Coverage, validity and concentration are those of one list a user: the last ranking case's, or, for a user
    with slates only, the one for the last slate's history. ``parts``: slices of the catalogue, name -> items;
    both metrics are also taken over the cases whose liked item is in each. ``measures``: of own checks.
    """
    judged = judged_slates(policy, slates, progress=progress)
    rates = mean_win_rates(judged)
    ranked = (
        rank_catalogue(
            policy, ranking, cutoffs=(k,), beam=beam, eligible=eligible, popular=popular, progress=progress
        )
        if ranking
        else None
    )
    full = dict(zip(ranked.users, ranked.per_user[f"ndcg@{k}"].tolist(), strict=True)) if ranked else {}
    asked = list_cases(slates, ranking, users)
    allowed = policy.eligible(eligible)
    lists = policy.recommend([context_of(case) for case in asked], k, beam=beam, eligible=allowed)
    items = [[one.item_id for one in listed] for listed in lists]
    shape = shape_of(policy, items, allowed, popular, None, k)
    per_user = {"slate": rates, "full": full}
    shown = {case.user_id: listed for case, listed in zip(asked, items, strict=True)}
    for name, measured in (measures or {}).items():
        per_user[f"own:{name}"] = dict(measured(policy, shown))
    cases = [(case.target, case.user_id) for case in ranking]
    gains = ranked.per_case[f"ndcg@{k}"] if ranked else np.empty(0)
    slices = {
        **sliced("slate", [(item, one.user_id) for one in judged for item in one.liked],
                 [float(share) for one in judged for share in one.shares], parts or {}, users),
        **sliced("full", cases, gains.tolist(), parts or {}, users),
    }  # fmt: skip
    return PolicyFigures(
        version=policy.version,
        per_user={
            name: np.array([values.get(user, np.nan) for user in users], dtype=np.float64)
            for name, values in per_user.items()
        },
        coverage=shape.coverage,
        validity=validity_of(policy, asked, items, allowed, True, k),
        concentration=shape.concentration,
        item_slices=slices,
    )
