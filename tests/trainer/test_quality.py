"""Quality of ids: exact against loops over pairs, 1 for ids without meaning, known lifts found again."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.tokenization.quality import (
    ambiguous_items,
    category_lift,
    codebook_perplexity,
    codebook_use,
    met_together,
    new_item_lift,
    together_lift,
)


def drawn(n: int, seed: int, codes: int = 3) -> tuple[np.ndarray, list[str | None]]:
    random = np.random.default_rng(seed)
    labels = [None if random.random() < 0.15 else f"c{random.integers(4)}" for _ in range(n)]
    return random.integers(0, codes, (n, 3)).astype(np.int32), labels


def histories_of(n_items: int, users: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, n_items, random.integers(0, 7)) for _ in range(users)]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 40), depth=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_category_lift_equals_a_loop_over_pairs(n: int, depth: int, seed: int) -> None:
    codes, labels = drawn(n, seed)
    found = category_lift(codes, labels, depth=depth, draws=5)
    known = [row for row in range(n) if labels[row] is not None]
    pairs = list(itertools.combinations(known, 2))
    same = [(a, b) for a, b in pairs if (codes[a, :depth] == codes[b, :depth]).all()]
    assert (found.items, found.pairs) == (len(known), len(same))
    assert found.share == pytest.approx(np.mean([labels[a] == labels[b] for a, b in same]) if same else 0)
    assert found.permuted == pytest.approx(
        np.mean([labels[a] == labels[b] for a, b in pairs]) if pairs else 0
    )


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), depth=st.integers(1, 2), seed=st.integers(0, 2**16))
def test_together_lift_equals_a_loop_over_pairs(n: int, depth: int, seed: int) -> None:
    codes, _ = drawn(n, seed)
    histories = histories_of(n, 12, seed)
    found = together_lift(codes, met_together(histories, n), depth=depth, draws=5)
    met = {pair for one in histories for pair in itertools.combinations(sorted(set(one.tolist())), 2)}
    pairs = list(itertools.combinations(range(n), 2))
    same = [(a, b) for a, b in pairs if (codes[a, :depth] == codes[b, :depth]).all()]
    assert found.pairs == len(same)
    assert found.share == pytest.approx(np.mean([pair in met for pair in same]) if same else 0)
    assert found.permuted == pytest.approx(len(met) / len(pairs) if pairs else 0)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 25), m=st.integers(0, 10), seed=st.integers(0, 2**16))
def test_new_item_lift_equals_a_loop_over_pairs(n: int, m: int, seed: int) -> None:
    codes, labels = drawn(n, seed)
    fresh, their = drawn(m, seed + 1)
    found = new_item_lift(codes, labels, fresh, their, depth=2, draws=5)
    known = [row for row in range(n) if labels[row] is not None]
    pairs = [
        (row, new)
        for new in range(m)
        for row in known
        if their[new] is not None and (codes[row, :2] == fresh[new, :2]).all()
    ]
    assert (found.items, found.pairs) == (sum(label is not None for label in their), len(pairs))
    assert found.share == pytest.approx(np.mean([labels[a] == their[b] for a, b in pairs]) if pairs else 0)
    chance = [np.mean([labels[row] == their[new] for row in known]) for _, new in pairs]
    assert found.permuted == pytest.approx(np.mean(chance) if chance else 0)


def test_the_permuted_share_is_the_mean_over_permutations_of_the_codes() -> None:
    random = np.random.default_rng(0)
    codes, labels = drawn(60, 0)
    fresh, their = drawn(20, 1)
    met = met_together(histories_of(60, 40, 0), 60)
    dealt = [codes[random.permutation(60)] for _ in range(400)]
    by_category = [category_lift(one, labels, draws=1).share for one in dealt]
    by_user = [together_lift(one, met, draws=1).share for one in dealt]
    new = new_item_lift(codes, labels, fresh, their, draws=1)
    # A permutation moves codes among items that have a category; 400 draws: 5 standard errors.
    kept = np.flatnonzero([label is not None for label in labels])
    by_new = []
    for _ in range(400):
        shuffled = codes.copy()
        shuffled[kept] = codes[random.permutation(kept)]
        by_new.append(new_item_lift(shuffled, labels, fresh, their, draws=1).share)
    for shares, exact in (
        (by_category, category_lift(codes, labels, draws=1).permuted),
        (by_user, together_lift(codes, met, draws=1).permuted),
        (by_new, new.permuted),
    ):
        assert np.mean(shares) == pytest.approx(exact, abs=5 * np.std(shares) / 20)


def test_ids_without_meaning_have_an_interval_that_holds_one() -> None:
    """A 95% interval may miss 1 in one run of twenty: in ten worlds, all three kinds, at most four do."""
    missed = 0
    for seed in range(10):
        codes, labels = drawn(400, seed, codes=6)
        fresh, their = drawn(150, seed + 100, codes=6)
        met = met_together(histories_of(400, 300, seed), 400)
        for one in (
            category_lift(codes, labels, draws=300, seed=seed),
            together_lift(codes, met, draws=300, seed=seed),
            new_item_lift(codes, labels, fresh, their, draws=300, seed=seed),
        ):
            assert one.low < one.lift < one.high
            missed += not one.low <= 1 <= one.high
    assert missed <= 4


def test_codes_made_from_categories_have_the_known_lift() -> None:
    """Five categories of twenty items each, a first code each: every pair shares it, 19/99 by chance."""
    labels = [f"c{row % 5}" for row in range(100)]
    codes = np.stack([np.arange(100) % 5, np.zeros(100), np.arange(100) // 5], axis=1).astype(np.int32)
    found = category_lift(codes, labels, draws=200)
    assert (found.pairs, found.share, found.lift) == (5 * 190, 1.0, pytest.approx(99 / 19))
    assert 1 < found.low <= found.lift <= found.high
    # Users who stay within a category meet pairs of one prefix only: 950 pairs of 4950 possible ones.
    histories = [np.arange(category, 100, 5) for category in range(5)]
    together = together_lift(codes, met_together(histories, 100), draws=200)
    assert (together.share, together.lift) == (1.0, pytest.approx(4950 / 950))
    new = new_item_lift(codes, labels, codes[:10], labels[:10], draws=200)
    assert (new.pairs, new.share, new.lift) == (200, 1.0, pytest.approx(5))


def test_an_interval_is_a_function_of_its_seed_and_not_of_what_is_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, labels = drawn(50, 3)
    whole = category_lift(codes, labels, draws=40, seed=7)
    monkeypatch.setattr("trainer.tokenization.quality._CELLS", 100)
    assert category_lift(codes, labels, draws=40, seed=7) == whole
    assert category_lift(codes, labels, draws=40, seed=8) != whole


def test_nothing_to_compare_is_a_lift_of_zero() -> None:
    codes = np.arange(12, dtype=np.int32).reshape(4, 3)
    for found in (
        category_lift(codes, [None] * 4),
        category_lift(codes, ["a", "b", "c", "d"]),
        together_lift(codes, met_together([], 4)),
        new_item_lift(codes, ["a"] * 4, codes[:0], []),
        new_item_lift(codes, ["a"] * 4, 20 + codes, ["b"] * 4),
    ):
        assert (found.lift, found.low, found.high) == (0.0, 0.0, 0.0)


def test_users_who_met_both_are_counted_once_each_and_a_long_history_by_its_end() -> None:
    met = met_together([np.array([0, 1, 1]), np.array([1, 0, 2]), np.array([], dtype=np.int64)], 4).toarray()
    np.testing.assert_array_equal(met, [[0, 2, 1, 0], [2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    assert met_together([np.arange(5)], 5, longest=2).nnz == 2


def test_ambiguous_items_are_counted() -> None:
    assert ambiguous_items(np.array([[0, 1], [0, 2], [0, 1], [3, 3]], dtype=np.int32)) == 2
    assert ambiguous_items(np.empty((0, 3), dtype=np.int32)) == 0


def test_use_and_perplexity_of_a_level() -> None:
    codes = np.array([[0, 0], [1, 0], [2, 0], [3, 0]], dtype=np.int32)
    assert codebook_use(codes, (8, 4)) == (0.5, 0.25)
    assert codebook_perplexity(codes) == pytest.approx((4, 1))
