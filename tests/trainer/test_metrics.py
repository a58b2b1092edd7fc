"""Recall, NDCG, intervals and the shape of lists, against independent implementations and by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall

from trainer.metrics import (
    CUTOFFS,
    Bootstrap,
    FloatArray,
    IntArray,
    ListShape,
    Places,
    best,
    per_case,
    rank_scores,
)


class Table:
    """A ranking model that knows one row of scores a history, named by the history's first item."""

    def __init__(self, scores: FloatArray) -> None:
        self.table = scores

    def scores(self, histories: list[IntArray]) -> FloatArray:
        return self.table[[history[0] for history in histories]]


def places_of(scores: np.ndarray, target: int) -> Places:
    better, tied = (scores > scores[target]).sum(), (scores == scores[target]).sum()
    return Places(np.array([float(better)]), np.array([tied]))


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_figures_are_those_of_torchmetrics(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 120))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    # From 1: torchmetrics takes an item with a score of 0 or less as not retrieved.
    scores, target = 1 + random.permutation(n).astype(np.float32), int(random.integers(n))
    k = data.draw(st.sampled_from(CUTOFFS))
    wanted = torch.zeros(n, dtype=torch.bool)
    wanted[target] = True
    mine = per_case(places_of(scores, target), [k])
    given_scores = torch.from_numpy(scores)
    # torchmetrics takes differences of float32 sums of up to 20, each good to about 1e-6.
    recall = float(retrieval_recall(given_scores, wanted, top_k=k))
    assert mine[f"recall@{k}"][0] == pytest.approx(recall, abs=1e-6)
    ndcg = float(retrieval_normalized_dcg(given_scores, wanted.long(), top_k=k))
    assert mine[f"ndcg@{k}"][0] == pytest.approx(ndcg, abs=1e-5)


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.data())
def test_ties_are_averaged_as_scikit_learn_does(data: st.DataObject) -> None:
    n, k = data.draw(st.integers(2, 40)), data.draw(st.sampled_from((1, 5, 10, 20)))
    scores = np.array(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=np.float64)
    target = data.draw(st.integers(0, n - 1))
    wanted = np.zeros(n)
    wanted[target] = 1.0
    places = places_of(scores, target)
    mine = per_case(places, [k])
    assert mine[f"ndcg@{k}"][0] == pytest.approx(ndcg_score([wanted], [scores], k=k), abs=1e-12)
    # The mean over all orders of the tied, written out.
    b, t = int(places.better[0]), int(places.tied[0])
    assert mine[f"recall@{k}"][0] == pytest.approx(np.mean([b + i < k for i in range(t)]), abs=1e-12)


def test_a_target_that_is_in_no_list_counts_nothing_and_the_first_place_counts_all() -> None:
    found = per_case(Places.of_ranks(np.array([np.inf, 1.0, 3.0])), (1, 5))
    assert found["recall@1"].tolist() == [0.0, 1.0, 0.0]
    np.testing.assert_allclose(found["ndcg@5"], [0.0, 1.0, 1 / math.log2(4)])


def test_a_constant_score_is_worth_chance_in_both_columns() -> None:
    n, order = 50, np.arange(50)
    ranked = rank_scores(
        Table(np.zeros((50, n), np.float32)), [np.array([3, 4])], np.array([7]), order, cutoffs=(5,), depth=5
    )
    assert ranked["all_items"].means["recall@5"] == pytest.approx(5 / 50)
    assert ranked["unseen"].means["recall@5"] == pytest.approx(5 / 48)


def test_the_columns_differ_by_the_items_met_and_by_nothing_else() -> None:
    random = np.random.default_rng(0)
    scores = random.normal(size=(30, 80)).astype(np.float32)
    histories = [
        np.concatenate([[u], random.permutation(np.arange(30, 80))[: u % 9]]).astype(np.int64)
        for u in range(30)
    ]
    targets = np.array([int(random.integers(30)) if u % 2 else int(histories[u][-1]) for u in range(30)])
    ranked = rank_scores(Table(scores), histories, targets, np.arange(80), cutoffs=(1, 10), depth=10)
    for column, found in ranked.items():
        for user, (history, target) in enumerate(zip(histories, targets, strict=True)):
            left = scores[user].copy()
            if column == "unseen":  # a target met before stays
                left[[item for item in history if item != target]] = -np.inf
            place = np.argsort(-left, kind="stable").tolist().index(target) + 1
            assert found.per_user["recall@10"][user] == (place <= 10)
            assert found.per_user["ndcg@10"][user] == pytest.approx(
                (place <= 10) / math.log2(1 + place), abs=1e-12
            )


def test_a_model_that_gives_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_scores(Table(np.full((1, 4), np.nan, np.float32)), [np.array([0])], np.array([1]), np.arange(4))


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_the_best_are_those_of_a_stable_sort(values: list[int], k: int) -> None:
    scores = np.array([values, values[::-1]], dtype=np.float32)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(best(scores, k), expected)


def test_what_was_left_out_is_not_among_the_best() -> None:
    scores = np.array([[1.0, -np.inf, 2.0]], dtype=np.float32)
    assert best(scores, 3).tolist() == [[2, 0, -1]]


def test_the_shape_of_lists_by_hand() -> None:
    order = np.arange(200)  # item 0 and 1 are the first 1%
    lists = np.array([[0, 5, 7, 9], [0, 199, -1, 9]])
    shape = ListShape.of(lists, order, depth=3)
    assert shape.coverage == 4 / 200
    assert shape.concentration == 2 / 5
    assert shape.popularity == pytest.approx(np.mean([1, 1 - 5 / 199, 1 - 7 / 199, 1, 0]))
    assert ListShape.of(lists, order, depth=3, popular=np.array([199])).concentration == 1 / 5
    assert ListShape.of(np.full((2, 3), -1), order, depth=3).coverage == 0.0


def test_an_interval_over_users_has_the_width_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=4000)
    found = Bootstrap(4000, seed=3).interval(values)
    error = values.std() / math.sqrt(4000)
    assert found.mean == pytest.approx(values.mean())
    # 1,000 resamples: the ends of the interval are good to about 0.1 standard errors.
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(2)
    boot, held = Bootstrap(200, seed=0, resamples=300), 0
    for _ in range(200):
        found = boot.interval((random.random(200) < 0.3).astype(np.float64))
        held += found.low <= 0.3 <= found.high
    assert 0.89 <= held / 200 <= 0.99  # 95%, with 200 trials and discrete values


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    values = np.random.default_rng(0).random(500)
    assert Bootstrap(500, seed=1).interval(values) == Bootstrap(500, seed=1).interval(values)
    assert Bootstrap(500, seed=1).interval(values) != Bootstrap(500, seed=2).interval(values)


def test_a_paired_difference_is_narrower_than_the_figures_it_is_taken_from() -> None:
    random = np.random.default_rng(4)
    users = random.random(1000)
    mine, other = {"m": users + 0.02 + 0.01 * random.normal(size=1000)}, {"m": users}
    boot = Bootstrap(1000)
    difference, single = boot.differences(mine, other)["m"], boot.interval(mine["m"])
    assert 0.018 < difference.low < difference.high < 0.022
    assert difference.high - difference.low < (single.high - single.low) / 10


def test_seeds_widen_the_interval_and_one_seed_does_not() -> None:
    random = np.random.default_rng(5)
    users = random.normal(size=2000)
    boot = Bootstrap(2000)
    assert boot.interval(users[None]) == boot.interval(users)
    apart = boot.interval(np.stack([users - 1.0, users, users + 1.0]))
    together = boot.interval(np.stack([users, users, users]))
    assert apart.mean == pytest.approx(together.mean)
    assert apart.high - apart.low > 3 * (together.high - together.low)


def test_figures_of_other_users_are_refused() -> None:
    with pytest.raises(ValueError, match="3 users"):
        Bootstrap(4).interval(np.zeros(3))
