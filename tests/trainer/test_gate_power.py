"""The gate before candidates of known worth: a slice of ``benchmarks/gate_power.py``, on a smaller world."""

import numpy as np
import pytest

from align3gr.demo.world import WorldSize
from benchmarks.gate_power import Bench, sequences
from benchmarks.loop.trials import TrialWorld, wilson
from benchmarks.loop.worlds import UNSEEN, demo
from trainer.slates import win_rate


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TrialWorld(demo(1, WorldSize(items=120, learners=900, evaluated=300)), 1), runs=8)


@pytest.mark.parametrize(("kind", "loss"), [("noise", 0.15), ("inverted", 0.15)])
def test_candidates_that_lose_much_of_their_worth_are_refused(bench: Bench, kind: str, loss: float) -> None:
    row = bench.kind(kind, loss, 500)
    assert row["loss_measured"] == pytest.approx(loss, abs=0.03)
    assert row["refuse"] == 1.0


def test_harm_in_a_slice_is_refused_by_the_slices_name(bench: Bench) -> None:
    row = bench.kind("young items", 0.5, 700)
    assert row["refuse"] >= 0.8
    assert any("young items" in name for name in row["failed"])


def test_a_candidate_that_is_truly_better_is_promoted_and_the_reference_itself_is_not(bench: Bench) -> None:
    assert bench.kind("better", -0.05, 700)["promote"] >= 0.75
    assert bench.equal("itself")["hold"] == 1.0
    assert bench.equal("twin")["promote"] <= 0.25


def test_the_anchor_stops_a_chain_of_small_losses(bench: Bench) -> None:
    row = bench.chains(anchored=True, runs=3)
    assert row["stopped"] == 1.0
    assert row["last_step"] < 20


def test_simulated_win_rates_are_those_of_evaluation(bench: Bench) -> None:
    trial = bench.trial
    log = trial.log(50, np.random.default_rng(0))
    scores = trial.reference[log.rows]
    figures = trial.figures("v1", scores, log)
    for user in range(50):
        rates = []
        for slate, levels in zip(
            log.slates[3 * user : 3 * user + 3], log.levels[3 * user : 3 * user + 3], strict=True
        ):
            seen = levels != UNSEEN
            liked = levels[seen] == 1
            if liked.any() and not liked.all():
                rates.append(win_rate(scores[user, slate[seen]], liked))
        assert figures.per_user["slate"][user] == pytest.approx(
            np.mean(rates) if rates else np.nan, nan_ok=True
        )


def test_canaries_without_a_difference_raise_few_alarms() -> None:
    found = sequences(12)
    assert all(one["false_alarms"] <= 1 / 6 for one in found.values())


def test_intervals_of_shares() -> None:
    low, high = wilson(190, 200)
    assert low == pytest.approx(0.910, abs=0.002)
    assert high == pytest.approx(0.973, abs=0.002)
