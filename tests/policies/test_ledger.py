"""The ledger: a pure fold over entries, compare-and-set between processes, deaf to torn files."""

import json
import multiprocessing
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.errors import PoliciesError
from policies.ledger import LedgerConflict, NothingToRollBack, PromotionHeld, PromotionLedger

START = datetime(2026, 1, 1, tzinfo=UTC)


class StepClock:
    """One minute later at every look."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.fixture
def ledger(tmp_path: Path) -> PromotionLedger:
    return PromotionLedger(tmp_path / "ledger", clock=StepClock())


def promote(ledger: PromotionLedger, version: str, **kwargs: bool) -> None:
    ledger.promote(version, expects=ledger.reference(), who="test", why="because", **kwargs)


def test_an_empty_ledger_has_no_reference_and_holds_nothing(ledger: PromotionLedger) -> None:
    assert (ledger.reference(), ledger.anchor(), ledger.held(), ledger.history()) == (None, None, False, [])


def test_the_first_promoted_policy_stays_the_anchor_until_another_is_set(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    promote(ledger, "v2")
    assert (ledger.reference(), ledger.anchor()) == ("v2", "v1")
    ledger.set_anchor("v2", who="test", why="new base")
    assert (ledger.reference(), ledger.anchor()) == ("v2", "v2")


def test_every_move_says_who_when_why_from_and_to(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    ledger.promote("v2", expects="v1", who="ann", why="better")
    entry = ledger.history()[-1]
    assert (entry.seq, entry.who, entry.why, entry.source, entry.target, entry.expects) == (
        2, "ann", "better", "v1", "v2", "v1",
    )  # fmt: skip
    on_disk = json.loads((ledger.directory / "00000002.json").read_text())
    assert on_disk["from"] == "v1"
    assert on_disk["to"] == "v2"


def test_a_move_that_expects_another_reference_changes_nothing(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    with pytest.raises(LedgerConflict, match="v1"):
        ledger.promote("v3", expects="v2", who="test", why="stale parent")
    with pytest.raises(LedgerConflict, match="already"):
        ledger.promote("v1", expects="v1", who="test", why="again")
    assert ledger.reference() == "v1"
    assert len(ledger.history()) == 1


def test_rollbacks_walk_back_along_the_promotions(ledger: PromotionLedger) -> None:
    for version in ("v1", "v2", "v3"):
        promote(ledger, version)
    assert ledger.rollback(who="test", why="bad").target == "v2"
    assert ledger.rollback(who="test", why="worse").target == "v1"
    with pytest.raises(NothingToRollBack):
        ledger.rollback(who="test", why="more")
    assert ledger.reference() == "v1"


def test_a_rollback_to_what_never_was_the_reference_is_refused(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    promote(ledger, "v2")
    for target in ("v9", "v2"):
        with pytest.raises(NothingToRollBack, match=target):
            ledger.rollback(who="test", why="typo", to=target)
    assert ledger.reference() == "v2"


def test_a_rollback_holds_automatic_promotion_until_it_is_resumed(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    promote(ledger, "v2")
    ledger.rollback(who="test", why="bad")
    with pytest.raises(PromotionHeld):
        promote(ledger, "v3", automatic=True)
    assert ledger.reference() == "v1"
    promote(ledger, "v3")
    assert ledger.held(), "a person's promotion must not lift the hold"
    ledger.resume(who="test", why="fixed")
    promote(ledger, "v4", automatic=True)
    assert ledger.reference() == "v4"


def test_the_reference_of_a_past_moment_is_known(ledger: PromotionLedger) -> None:
    promote(ledger, "v1")
    promote(ledger, "v2")
    ledger.rollback(who="test", why="bad")
    at = [ledger.reference_at(START + timedelta(minutes=minute)) for minute in range(5)]
    assert at == [None, "v1", "v2", "v1", "v1"]


@pytest.mark.parametrize("torn", [b"", b'{"seq": 2, "at"', b"[]", b"\xff\xfe", b'{"action": "teleport"}'])
def test_a_torn_entry_is_skipped_and_its_number_is_not_reused(ledger: PromotionLedger, torn: bytes) -> None:
    promote(ledger, "v1")
    (ledger.directory / "00000002.json").write_bytes(torn)
    (ledger.directory / ".half.tmp").write_bytes(b'{"seq": 2')
    assert ledger.reference() == "v1"
    promote(ledger, "v2")
    assert ledger.reference() == "v2"
    assert (ledger.directory / "00000003.json").exists()


def test_a_ledger_that_cannot_be_written_says_so_and_moves_nothing(tmp_path: Path) -> None:
    ledger = PromotionLedger(tmp_path / "ledger", clock=StepClock())
    promote(ledger, "v1")
    # A directory in the way of every write: works for root too, unlike permissions.
    (tmp_path / "ledger").rename(tmp_path / "kept")
    (tmp_path / "ledger").symlink_to("/proc/self/fdinfo")
    with pytest.raises(PoliciesError, match="has not moved"):
        ledger.promote("v2", expects=None, who="test", why="full disk")
    assert PromotionLedger(tmp_path / "kept").reference() == "v1"


class _Model:
    """The obvious model: a list of references, walked back by rollbacks."""

    def __init__(self) -> None:
        self.line: list[str] = []
        self.held = False


@settings(max_examples=60, deadline=None)
@given(moves=st.lists(st.sampled_from(["promote", "auto", "rollback", "hold", "resume"]), max_size=14))
def test_any_sequence_of_moves_gives_what_the_obvious_model_gives(
    tmp_path_factory: pytest.TempPathFactory, moves: list[str]
) -> None:
    ledger = PromotionLedger(tmp_path_factory.mktemp("ledger"), clock=StepClock())
    model = _Model()
    for number, move in enumerate(moves):
        version = f"v{number + 1}"
        if move == "promote" or (move == "auto" and not model.held):
            promote(ledger, version, automatic=move == "auto")
            model.line.append(version)
        elif move == "auto":
            with pytest.raises(PromotionHeld):
                promote(ledger, version, automatic=True)
        elif move == "rollback" and len(model.line) > 1:
            ledger.rollback(who="test", why="model")
            model.line.pop()
            model.held = True
        elif move == "rollback":
            with pytest.raises(NothingToRollBack):
                ledger.rollback(who="test", why="model")
        elif move == "hold":
            ledger.hold(who="test", why="model")
            model.held = True
        else:
            ledger.resume(who="test", why="model")
            model.held = False
        assert ledger.reference() == (model.line[-1] if model.line else None)
        assert ledger.held() == model.held


def _race(directory: str, version: str, barrier: object, results: object) -> None:
    ledger = PromotionLedger(Path(directory))
    barrier.wait()  # type: ignore[attr-defined]
    try:
        ledger.promote(version, expects="v0", who=str(os.getpid()), why="race")
        results.put((version, "won"))  # type: ignore[attr-defined]
    except LedgerConflict:
        results.put((version, "lost"))  # type: ignore[attr-defined]


def test_of_many_processes_that_promote_at_once_exactly_one_wins(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    for attempt in range(5):
        directory = tmp_path / str(attempt)
        ledger = PromotionLedger(directory)
        ledger.promote("v0", expects=None, who="test", why="start")
        barrier, results = spawn.Barrier(12), spawn.Queue()
        racers = [
            spawn.Process(target=_race, args=(str(directory), f"v{n}", barrier, results))
            for n in range(1, 13)
        ]
        for racer in racers:
            racer.start()
        outcomes = [results.get(timeout=30) for _ in racers]
        for racer in racers:
            racer.join(timeout=30)
        winners = [version for version, outcome in outcomes if outcome == "won"]
        assert len(winners) == 1
        assert ledger.reference() == winners[0]
        assert [entry.seq for entry in ledger.history()] == [1, 2]
        assert not list(directory.glob(".*.tmp"))


def _hold(directory: str, barrier: object, times: int) -> None:
    ledger = PromotionLedger(Path(directory))
    barrier.wait()  # type: ignore[attr-defined]
    for _ in range(times):
        ledger.hold(who=str(os.getpid()), why="race")


def test_moves_that_do_not_exclude_each_other_all_land(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(6)
    racers = [fork.Process(target=_hold, args=(str(tmp_path / "l"), barrier, 5)) for _ in range(6)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(timeout=60)
    assert [entry.seq for entry in PromotionLedger(tmp_path / "l").history()] == list(range(1, 31))
