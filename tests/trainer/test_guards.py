"""Guards: each bound is tripped once, nothing trips them all the same, and real harm is seen."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.policy import Policy
from policies.settings import DecodingSettings
from tests.policies.factory import tiny_codec, write_tiny_policy
from trainer.cases import RankingCase
from trainer.evaluation import rank_catalogue
from trainer.preference.guards import GuardFigures, broken, guard_cases, measure_guards
from trainer.settings import GuardSettings

BEFORE = GuardFigures(
    users=500,
    ndcg=0.05,
    recall=0.2,
    coverage=0.4,
    popularity=0.8,
    chosen_log_prob=-6.0,
    validity=1.0,
)
BOUNDS = GuardSettings()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ndcg": 0.048}, "NDCG@10 fell by 4.0%, from 0.0500 to 0.0480; 2.0% is allowed"),
        ({"recall": 0.19}, "Recall@50 fell by 5.0%, from 0.2000 to 0.1900; 2.0% is allowed"),
        ({"coverage": 0.3}, "coverage fell by 25.0%, from 0.4000 to 0.3000; 5.0% is allowed"),
        ({"popularity": 0.9}, "popularity of what is recommended rose by 0.1000"),
        ({"chosen_log_prob": -7.0}, "held-out items lost log-probability by 1.0000, from -6.0000 to -7.0000"),
        ({"validity": 0.99}, "only 99.00% of the lists are valid; must be 100.00%"),
    ],
)
def test_each_bound_is_tripped_by_its_own_figure_alone(changed: dict[str, float], says: str) -> None:
    (sentence,) = broken(BEFORE, replace(BEFORE, **changed), BOUNDS)  # type: ignore[arg-type]
    assert says in sentence


def test_what_stays_within_the_bounds_breaks_none() -> None:
    worse = replace(BEFORE, ndcg=0.049, recall=0.196, coverage=0.38, popularity=0.82, chosen_log_prob=-6.5)
    assert broken(BEFORE, worse, BOUNDS) == []
    better = replace(BEFORE, ndcg=0.9, recall=0.9, coverage=0.9, popularity=0.1, chosen_log_prob=-1.0)
    assert broken(BEFORE, better, BOUNDS) == []


def test_figures_are_those_of_evaluation_and_survive_a_file(tmp_path: Path) -> None:
    policy, cases = _policy(tmp_path / "v1"), _cases()
    found = measure_guards(policy, cases)
    ranked = rank_catalogue(policy, cases, cutoffs=(10, 50), beam=50)
    assert found.ndcg == ranked.means["ndcg@10"]
    assert found.recall == ranked.means["recall@50"]
    assert (found.validity, found.users) == (1.0, 40)
    assert found.chosen_log_prob < 0
    assert GuardFigures.from_dict(found.as_dict()) == found


def test_a_policy_that_forgot_everything_is_seen(tmp_path: Path) -> None:
    """The real figures of a real policy and of one whose every answer is the same."""
    policy, cases = _policy(tmp_path / "v1"), _cases()
    wanted = policy.recommend([_user(case) for case in cases], 1)
    known = [replace(case, target=listed[0].item_id) for case, listed in zip(cases, wanted, strict=True)]
    before = measure_guards(policy, known)
    assert before.ndcg == 1.0
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.normal_()
    words = " ".join(broken(before, measure_guards(policy, known), BOUNDS))
    assert "NDCG@10 fell" in words
    assert "lost log-probability" in words


def test_the_same_users_are_looked_at_and_too_few_are_not_judged() -> None:
    cases = _cases()
    some = guard_cases(cases, GuardSettings(users=15, min_users=10))
    assert len({case.user_id for case in some}) == 15
    assert some == guard_cases(cases[::-1], GuardSettings(users=15, min_users=10))[::-1]
    assert guard_cases(cases, GuardSettings(users=15, min_users=41)) == []


def _policy(folder: Path) -> Policy:
    write_tiny_policy(folder, codec=tiny_codec(60))
    return Policy.load(folder, settings=DecodingSettings(batch=64))


def _cases() -> list[RankingCase]:
    random = np.random.default_rng(0)
    found = []
    for user in range(40):
        items = [f"item-{n:03d}" for n in random.permutation(60)[:5]]
        found.append(RankingCase(f"u{user}", tuple(items[:-1]), items[-1]))
    return found


def _user(case: RankingCase):  # type: ignore[no-untyped-def]
    from policies.policy import UserContext

    return UserContext(case.user_id, case.history, frozenset(case.history))
