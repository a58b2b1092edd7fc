"""The canary in the ledger: one at a time, grown and ended by compare-and-set, remembered by nothing else."""

import multiprocessing
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from policies.ledger import (
    BadShare,
    CanaryUnderWay,
    LedgerConflict,
    NoCanary,
    PromotionHeld,
    PromotionLedger,
)
from policies.settings import CanarySettings
from tests.policies.test_ledger import START, StepClock


@pytest.fixture
def ledger(tmp_path: Path) -> PromotionLedger:
    ledger = PromotionLedger(tmp_path / "ledger", clock=StepClock())
    ledger.promote("v1", expects=None, who="test", why="first")
    return ledger


def start(
    ledger: PromotionLedger, version: str = "v2", share: float = 0.05, *, automatic: bool = False
) -> None:
    ledger.start_canary(version, share, expects="v1", who="test", why="try", automatic=automatic)


def test_a_canary_takes_a_share_and_the_reference_stays(ledger: PromotionLedger) -> None:
    assert ledger.canary() is None
    start(ledger)
    canary = ledger.canary()
    assert canary is not None
    assert (canary.version, canary.share, canary.seq) == ("v2", 0.05, 2)
    assert canary.began_at == canary.step_at == START + timedelta(minutes=2)
    assert (ledger.reference(), ledger.previous(), ledger.held()) == ("v1", None, False)


def test_a_canary_grows_from_the_share_that_was_read(ledger: PromotionLedger) -> None:
    start(ledger)
    read = ledger.canary()
    assert read is not None
    ledger.grow_canary(read, 0.25, who="test", why="well")
    grown = ledger.canary()
    assert grown is not None
    assert (grown.share, grown.began_at, grown.seq) == (0.25, read.began_at, read.seq)
    assert grown.step_at == read.step_at + timedelta(minutes=1)
    with pytest.raises(NoCanary, match="moved on"):
        ledger.grow_canary(read, 0.25, who="another", why="the same look")
    with pytest.raises(BadShare, match="only grows"):
        ledger.grow_canary(grown, 0.25, who="test", why="well")
    assert [entry.share for entry in ledger.history()] == [None, 0.05, 0.25]


def test_a_canary_that_is_promoted_is_the_reference_and_no_canary(ledger: PromotionLedger) -> None:
    start(ledger)
    ledger.promote("v2", expects="v1", who="test", why="well")
    assert (ledger.reference(), ledger.previous(), ledger.canary()) == ("v2", "v1", None)


def test_a_withdrawn_canary_leaves_the_reference_and_holds_promotion(ledger: PromotionLedger) -> None:
    start(ledger)
    entry = ledger.withdraw("v2", who="server", why="errors")
    assert (entry.action, entry.source, entry.target) == ("withdraw", "v1", "v2")
    assert (ledger.reference(), ledger.canary(), ledger.held()) == ("v1", None, True)
    with pytest.raises(NoCanary, match="there is none"):
        ledger.withdraw("v2", who="another server", why="errors")
    with pytest.raises(PromotionHeld):
        start(ledger, "v3", automatic=True)
    start(ledger, "v3")
    assert ledger.canary() is not None


def test_whatever_moves_the_reference_ends_the_canary(ledger: PromotionLedger) -> None:
    ledger.promote("v2", expects="v1", who="test", why="better")
    ledger.start_canary("v3", 0.1, expects="v2", who="test", why="try")
    ledger.rollback(who="test", why="bad")
    assert (ledger.reference(), ledger.canary()) == ("v1", None)


def test_two_canaries_at_once_are_refused(ledger: PromotionLedger) -> None:
    start(ledger)
    for version in ("v2", "v3"):
        with pytest.raises(CanaryUnderWay, match=r"v2 is the canary and has 0\.05"):
            start(ledger, version)
    with pytest.raises(CanaryUnderWay, match="policy withdraw v2"):
        ledger.promote("v3", expects="v1", who="test", why="past it")
    assert len(ledger.history()) == 2


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(ledger: PromotionLedger, share: float) -> None:
    with pytest.raises(BadShare, match="above 0 and below 1"):
        start(ledger, share=share)
    assert len(ledger.history()) == 1


def test_a_canary_needs_the_reference_it_expects_and_is_another(
    ledger: PromotionLedger, tmp_path: Path
) -> None:
    with pytest.raises(LedgerConflict, match="already"):
        start(ledger, "v1")
    with pytest.raises(LedgerConflict, match="the reference is v1"):
        ledger.start_canary("v3", 0.1, expects="v2", who="test", why="stale")
    with pytest.raises(LedgerConflict, match="needs a reference"):
        PromotionLedger(tmp_path / "none").start_canary("v1", 0.1, expects=None, who="t", why="t")


def _start_one(directory: Path, version: str, won: "multiprocessing.Queue[str]") -> None:
    try:
        PromotionLedger(directory).start_canary(version, 0.1, expects="v1", who=version, why="race")
    except CanaryUnderWay:
        return
    won.put(version)


def test_of_many_processes_one_starts_its_canary(ledger: PromotionLedger) -> None:
    context = multiprocessing.get_context("fork")
    won = context.Queue()
    racers = [
        context.Process(target=_start_one, args=(ledger.directory, f"v{number}", won))
        for number in range(2, 8)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    canary = ledger.canary()
    assert canary is not None
    assert won.get(timeout=5) == canary.version
    assert won.empty()


@pytest.mark.parametrize(
    "steps", [[], [1.0], [0.05, 0.25], [0.25, 0.05, 1], [0.1, 0.1, 1], [0, 1], [0.5, 1.5]]
)
def test_steps_that_do_not_grow_to_all_users_are_refused(steps: list[float]) -> None:
    with pytest.raises(ValidationError):
        CanarySettings.model_validate({"steps": steps})


def test_the_step_after_a_share_is_the_next_larger_one() -> None:
    settings = CanarySettings()
    assert [settings.step_after(share) for share in (0.01, 0.05, 0.3, 0.4, 0.9)] == [0.05, 0.1, 0.5, 0.5, 1]
