"""Evaluation: every figure against a direct formula, on a real tiny policy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from policies.policy import Policy, UserContext
from policies.prompt import answer_ids, prompt_ids
from tests.policies.factory import item_ids, write_tiny_policy
from trainer.cases import RankingCase, leave_one_out
from trainer.evaluation import popularity_baseline, rank_catalogue
from trainer.gate_figures import gate_figures
from trainer.slates import SlateCase, log_probs, win_rate, win_rates

NAMES = item_ids(200)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    torch.set_num_threads(1)
    return Policy.load(write_tiny_policy(tmp_path_factory.mktemp("policies") / "v1"))


@pytest.fixture(scope="module")
def cases() -> list[RankingCase]:
    random = np.random.default_rng(0)
    found = []
    for number in range(40):
        picked = random.permutation(200)[: int(random.integers(2, 30))]
        history = tuple(NAMES[i] for i in picked[1:])
        found.append(RankingCase(f"u{number % 25}", history, NAMES[picked[0]]))
    return found


def direct(lists: list[list[str]], cases: list[RankingCase], k: int) -> tuple[float, float]:
    """Recall@k and NDCG@k, mean over users of the mean over their cases, written out."""
    recall: dict[str, list[float]] = {}
    ndcg: dict[str, list[float]] = {}
    for listed, case in zip(lists, cases, strict=True):
        place = listed[:k].index(case.target) + 1 if case.target in listed[:k] else None
        recall.setdefault(case.user_id, []).append(float(place is not None))
        ndcg.setdefault(case.user_id, []).append(1 / math.log2(1 + place) if place else 0.0)
    return (
        sum(sum(v) / len(v) for v in recall.values()) / len(recall),
        sum(sum(v) / len(v) for v in ndcg.values()) / len(ndcg),
    )


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_ranking_figures_are_their_formula(
    exclude_seen: bool, policy: Policy, cases: list[RankingCase]
) -> None:
    figures = rank_catalogue(policy, cases, cutoffs=(1, 10, 50), exclude_seen=exclude_seen)
    users = [UserContext(case.user_id, case.history, frozenset(case.history)) for case in cases]
    lists = [
        [one.item_id for one in listed] for listed in policy.recommend(users, 50, exclude_seen=exclude_seen)
    ]
    for k in (1, 10, 50):
        recall, ndcg = direct(lists, cases, k)
        assert figures.means[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
        assert figures.means[f"ndcg@{k}"] == pytest.approx(ndcg, abs=1e-12)
    assert figures.means["recall@50"] > 0
    assert figures.users == tuple(dict.fromkeys(case.user_id for case in cases))
    assert figures.cases == 40
    assert figures.coverage == len({item for listed in lists for item in listed}) / 200
    assert figures.validity == 1.0
    assert figures.concentration == pytest.approx(
        sum(item in NAMES[:2] for listed in lists for item in listed) / (50 * 40)
    )
    assert figures.seen_left_out == exclude_seen


def test_a_target_in_the_history_can_be_found_and_an_unknown_one_cannot(policy: Policy) -> None:
    # Leaving it out with the seen items would make it unfindable by construction.
    again = RankingCase("u", (NAMES[0], NAMES[1]), NAMES[1])
    gone = RankingCase("v", (NAMES[0],), "not-in-the-codec")
    figures = rank_catalogue(policy, [again, gone], cutoffs=(200,))
    assert figures.per_user["recall@200"].tolist() == [1.0, 0.0]


def test_only_eligible_items_are_listed_and_counted(policy: Policy, cases: list[RankingCase]) -> None:
    eligible = NAMES[:30]
    figures = rank_catalogue(policy, cases, cutoffs=(10,), eligible=eligible)
    assert figures.validity == 1.0
    assert 0 < figures.coverage <= 1.0
    target_gone = rank_catalogue(
        policy, [RankingCase("u", (NAMES[40],), NAMES[50])], cutoffs=(10,), eligible=eligible
    )
    assert target_gone.means["recall@10"] == 0.0


def test_popularity_is_measured_by_the_same_formula(cases: list[RankingCase]) -> None:
    lists = [[name for name in NAMES if name not in case.history][:10] for case in cases]
    found = popularity_baseline(NAMES, cases, cutoffs=(5, 10))
    for k in (5, 10):
        recall, ndcg = direct(lists, cases, k)
        assert found[f"recall@{k}"] == pytest.approx(recall, abs=1e-12)
        assert found[f"ndcg@{k}"] == pytest.approx(ndcg, abs=1e-12)


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=12))
def test_the_win_rate_counts_pairs(slate: list[tuple[int, bool]]) -> None:
    liked = [score for score, mark in slate if mark]
    other = [score for score, mark in slate if not mark]
    if not liked or not other:
        return
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in liked for b in other)
    found = win_rate(np.array([s for s, _ in slate], dtype=np.float64), np.array([m for _, m in slate]))
    assert found == pytest.approx(wins / (len(liked) * len(other)))


def test_items_are_scored_as_a_plain_forward_pass_scores_them(policy: Policy) -> None:
    history, items = NAMES[3:8], NAMES[20:23]
    (scores,) = log_probs(policy, [(history, items)])
    for item, score in zip(items, scores, strict=True):
        prompt, answer = prompt_ids(policy.tokens, history), answer_ids(policy.tokens, item)
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected = sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True))
        assert score == pytest.approx(expected, abs=1e-4)


def test_slates_are_judged_by_user_and_by_what_is_known(policy: Policy) -> None:
    items = tuple(NAMES[20:24])
    (scores,) = log_probs(policy, [((NAMES[0],), items)])
    best = int(scores.argmax())
    levels = tuple(1 if i == best else -1 for i in range(4))
    inverted = tuple(-1 if i == best else 1 for i in range(4))
    slates = [
        SlateCase("right", (NAMES[0],), items, levels),
        SlateCase("half", (NAMES[0],), items, levels),
        SlateCase("half", (NAMES[0],), items, inverted),
        SlateCase("nothing", (NAMES[0],), items, (1, 1, 1, 1)),
        SlateCase("unknown", (NAMES[0],), (items[0], "gone"), (1, 0)),
        SlateCase("unsaid", (NAMES[0],), items[:2], (1, None)),
    ]
    assert win_rates(policy, slates) == {"right": 1.0, "half": 0.5}


def test_the_gates_figures_have_one_value_a_user_and_gaps_where_there_is_no_case(
    policy: Policy, cases: list[RankingCase]
) -> None:
    slates = [SlateCase("s", (NAMES[0],), tuple(NAMES[20:24]), (1, 0, 0, -1))]
    users = ("s", "u0", "nobody")
    figures = gate_figures(policy, slates, cases, users, eligible=NAMES)
    assert figures.version == "v1"
    assert np.isnan(figures.per_user["slate"]).tolist() == [False, True, True]
    assert np.isnan(figures.per_user["full"]).tolist() == [True, False, True]
    expected = rank_catalogue(policy, cases, cutoffs=(10,), eligible=NAMES)
    assert figures.per_user["full"][1] == expected.per_user["ndcg@10"][expected.users.index("u0")]
    assert figures.validity == 1.0
    assert 0 < figures.coverage <= 20 / 200
    again = gate_figures(policy, slates, cases, users, eligible=NAMES)
    np.testing.assert_array_equal(again.per_user["slate"], figures.per_user["slate"])
    empty = gate_figures(policy, [], [], users)
    assert np.isnan(empty.per_user["full"]).all()


def test_leave_one_out_never_shows_the_target_or_what_follows() -> None:
    split = list(leave_one_out({"a": ["1", "2", "3"], "b": ["1"]}, back=2))
    assert [(case.target, case.history, training) for case, training in split] == [("2", ("1",), ("1",))]


def test_figures_are_plain_json(policy: Policy, cases: list[RankingCase], tmp_path: Path) -> None:
    import json

    facts = rank_catalogue(policy, cases[:3], cutoffs=(5,)).as_dict()
    assert json.loads(json.dumps(facts)) == facts
