"""Confidence sequences: what they promise at every look, what they store, what they refuse."""

import json

import numpy as np
import pytest

from policies.errors import PoliciesError
from policies.sequential import ConfidenceSequence, Sums, paired_differences


def test_looking_after_every_batch_raises_no_more_false_alarms_than_promised() -> None:
    alarms = naive = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        sequence, seen, fooled = ConfidenceSequence(0.05), np.empty(0), False
        for _ in range(30):
            batch = (random.random(40) < 0.3).astype(float) - (random.random(40) < 0.3)
            sequence.update(batch)
            seen = np.concatenate([seen, batch])
            fooled |= bool(abs(seen.mean()) > 1.96 * seen.std() / len(seen) ** 0.5)
            if not sequence.low <= 0.0 <= sequence.high:
                alarms += 1
                break
        naive += fooled
    # At 5% more than 7 of 60 alarms have probability 2%; an interval for one look fails in a quarter of runs.
    assert alarms <= 7
    assert naive >= 9


def test_a_real_difference_is_found() -> None:
    random = np.random.default_rng(1)
    sequence = ConfidenceSequence(0.05)
    sequence.update((random.random(3000) < 0.3).astype(float) - (random.random(3000) < 0.4))
    assert sequence.low < -0.1 < sequence.high < 0.0
    # at its best it is at most twice as wide as the interval that may be looked at once
    assert sequence.high - sequence.low < 2 * 2 * 1.96 * 0.67 / 3000**0.5


def test_a_sequence_built_again_from_its_sums_is_the_same() -> None:
    random = np.random.default_rng(2)
    batches = random.uniform(-1, 1, (4, 25))
    whole = ConfidenceSequence(0.1, tightest_at=100)
    for batch in batches:
        whole.update(batch)
    halted = ConfidenceSequence(0.1, tightest_at=100).update(batches[0]).update(batches[1])
    stored = json.loads(json.dumps(halted.sums.as_dict()))
    again = (
        ConfidenceSequence(0.1, tightest_at=100, sums=Sums(**stored)).update(batches[2]).update(batches[3])
    )
    assert (again.low, again.high, again.n) == (whole.low, whole.high, 100)


def test_batches_cut_elsewhere_give_the_same_interval() -> None:
    values = np.random.default_rng(3).uniform(0, 1, 90)
    once = ConfidenceSequence(bounds=(0, 1)).update(values)
    thrice = ConfidenceSequence(bounds=(0, 1))
    for part in np.split(values, 3):
        thrice.update(part)
    assert thrice.low == pytest.approx(once.low, rel=1e-12)
    assert thrice.high == pytest.approx(once.high, rel=1e-12)


def test_nothing_is_known_before_the_first_observation() -> None:
    sequence = ConfidenceSequence(0.05, bounds=(0.0, 2.0)).update([])
    assert (sequence.low, sequence.mean, sequence.high) == (0.0, 1.0, 2.0)


def test_constant_observations_still_leave_doubt() -> None:
    sequence = ConfidenceSequence(0.05, bounds=(0.0, 1.0)).update(np.zeros(50))
    assert sequence.low == 0.0
    assert 0.02 < sequence.high < 0.5


@pytest.mark.parametrize("values", [[0.0, 1.5], [float("nan")], [float("inf")]])
def test_values_outside_of_the_bounds_are_refused_and_nothing_is_taken(values: list[float]) -> None:
    sequence = ConfidenceSequence().update([0.1])
    with pytest.raises(PoliciesError, match="must lie between"):
        sequence.update(values)
    assert sequence.n == 1


@pytest.mark.parametrize(
    "arguments", [{"alpha": 0.0}, {"alpha": 1.0}, {"bounds": (1.0, 1.0)}, {"tightest_at": 0}]
)
def test_impossible_settings_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(PoliciesError):
        ConfidenceSequence(**arguments)  # type: ignore[arg-type]


def test_pairs_take_a_share_of_the_control_group_each() -> None:
    found = paired_differences([1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 9.0])
    assert found.tolist() == [0.5, -1.0]
    assert paired_differences([1.0, 0.0], [0.5]).tolist() == []
    assert paired_differences([], [0.5]).tolist() == []
