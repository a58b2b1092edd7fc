"""The interval by betting: how members are cut into blocks, what it promises, and that it says so."""

import itertools

import numpy as np
import pytest

from policies.betting import Blocks
from policies.errors import PoliciesError
from policies.sequential import ConfidenceSequence, paired_differences


def sides(word: str) -> np.ndarray:
    return np.array([letter == "t" for letter in word])


def test_a_block_ends_with_the_first_of_the_other_side() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.1, 0.3, 0.5, 0.7, 1.0])
    blocks = Blocks.of(values, sides("ootottoo"))
    assert blocks.differences.tolist() == pytest.approx([0.6, 0.2, -0.2])
    assert blocks.weights.tolist() == pytest.approx([2 / 3, 1 / 2, 1 / 2])


def test_what_has_been_looked_at_stays_when_more_becomes_known() -> None:
    draw = np.random.default_rng(5)
    values, treated = draw.random(300), draw.random(300) < 0.3
    whole = Blocks.of(values, treated)
    for known in range(300):
        part = Blocks.of(values[:known], treated[:known])
        assert part.differences.tolist() == whole.differences[: len(part.differences)].tolist()


def test_the_capital_is_a_fair_game_where_both_sides_are_equal() -> None:
    """Exactly: over all 4^4 outcomes of four blocks of one each, no bet gains."""
    from policies.betting import _log_capital

    outcomes = list(itertools.product([0.0, 1.0], repeat=8))
    capital = [
        np.exp(_log_capital(blocks.differences, blocks.weights, 0.0))
        for blocks in (Blocks.of(np.array(one), sides("tototoot")) for one in outcomes)
    ]
    assert np.mean(capital) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_difference_is_found_with_fewer_users_than_the_sequence_needs(share: float) -> None:
    draw = np.random.default_rng(6)
    treated = draw.random(round(250 / share)) < share
    values = draw.binomial(10, draw.beta(3, 7, len(treated))) / 10
    low, high = Blocks.of(values, treated).interval(0.05)
    fewest = min(treated.sum(), (~treated).sum())
    sequence = ConfidenceSequence(0.05).update(paired_differences(values[treated][:fewest], values[~treated]))
    assert low < 0.0 < high
    assert high - low < sequence.high - sequence.low


def test_looking_at_every_block_raises_no_more_false_alarms_than_promised() -> None:
    draw = np.random.default_rng(7)
    alarms = 0
    for _ in range(100):
        values, treated = draw.binomial(3, 0.3, 300) / 3, draw.random(300) < 0.3
        looks = (Blocks.of(values[:known], treated[:known]).interval(0.1) for known in range(20, 301, 20))
        alarms += any(not low <= 0.0 <= high for low, high in looks)
    assert alarms <= 10  # 10% of 100 are allowed


def test_nothing_known_is_everything_possible() -> None:
    assert Blocks.of(np.empty(0), sides("")).interval(0.05) == (-1.0, 1.0)
    assert Blocks.of(np.array([0.2, 0.4]), sides("tt")).interval(0.05) == (-1.0, 1.0)


def test_a_plain_difference_is_found_at_once() -> None:
    low, high = Blocks.of(np.resize([1.0, 0.0], 100), sides("to" * 50)).interval(0.05)
    assert (low > 0.5, high) == (True, 1.0)


@pytest.mark.parametrize("values", [[0.5, 1.2], [-0.1, 0.5], [0.5, float("nan")]])
def test_values_out_of_bounds_are_refused(values: list[float]) -> None:
    with pytest.raises(PoliciesError, match="between 0 and 1"):
        Blocks.of(np.array(values), sides("to"))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_confidence_that_makes_no_sense_is_refused(alpha: float) -> None:
    with pytest.raises(PoliciesError, match="alpha between 0 and 1"):
        Blocks.of(np.array([0.5, 0.5]), sides("to")).interval(alpha)
