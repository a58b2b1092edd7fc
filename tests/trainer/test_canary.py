"""A look at the canary from a real log and a real ledger: what it moves; nothing is kept between looks."""

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from features.batch import InteractionBatch, Record
from features.interactions import Interaction, Kind, encode_interaction
from features.judged_versions import judged_versions
from features.log import FeedbackLog, offsets_app, watermark_app
from features.settings import FeatureSettings
from policies.ledger import PromotionLedger
from policies.settings import CanarySettings, PolicySettings, PromotionSettings
from policies.shares import place_of
from tests.features.feedback_oracle import EPOCH, row, write_snapshot
from trainer.canary import follow, look
from trainer.live import live_policies
from trainer.round_state import RoundState
from trainer.round_steps import RoundSteps
from trainer.workplace import Workplace

BEGAN = datetime(2026, 3, 1, tzinfo=UTC)
NOW = BEGAN + timedelta(days=1)
USERS = [f"user-{number}" for number in range(1200)]
CANARY = CanarySettings(steps=(0.5, 0.8, 1.0), judged=4, min_users=50, step_s=3600)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """v1 is the reference, v2 the canary with half of the users since BEGAN."""
    ledger = PromotionLedger(tmp_path / "ledger", clock=lambda: BEGAN)
    ledger.promote("v1", expects=None, who="test", why="first")
    ledger.start_canary("v2", 0.5, expects="v1", who="test", why="try")
    policies = PolicySettings(promotion=PromotionSettings(canary=CANARY))
    return Workplace(tmp_path, policies=policies, clock=lambda: NOW)


def lived(place: Workplace, canary_likes: float, reference_likes: float) -> None:
    """Every user sees six items of the policy that serves them, and likes some."""
    random = np.random.default_rng(3)
    events = []
    for user in USERS:
        version = "v2" if place_of(user, "v2") < 0.5 else "v1"
        likes = canary_likes if version == "v2" else reference_likes
        events += list(_slate(user, version, random.random(6) < likes))
    log = FeedbackLog.open(place.home / "log")
    app, mark = offsets_app("test", "interactions", 0), watermark_app("test", "interactions", 0)
    log.transaction_version(app)
    log.transaction_version(mark)
    batch = InteractionBatch.of(FeatureSettings())
    refused = batch.add(
        [
            Record(encode_interaction(event), 0, number, int(event.occurred_at.timestamp() * 1000))
            for number, event in enumerate(events)
        ],
        now=NOW,
    )
    assert not refused
    log.append(batch.table(NOW), {app: len(events) - 1, mark: int(NOW.timestamp() * 1000)})


def _slate(
    user: str, version: str, liked: "np.ndarray[tuple[int], np.dtype[np.bool_]]"
) -> Iterator[Interaction]:
    for number, likes in enumerate(liked):
        at = BEGAN + timedelta(minutes=1, seconds=number)
        about = {
            "user_id": user,
            "item_id": f"i{number}",
            "policy_version": version,
            "request_id": f"r-{user}",
        }
        for kind in (Kind.SERVED, Kind.IMPRESSION, *([Kind.LIKE] if likes else [])):
            yield Interaction(event_id=f"{kind}-{user}-{number}", kind=kind, occurred_at=at, **about)  # type: ignore[arg-type]


def test_a_canary_that_does_well_grows_and_becomes_the_reference(place: Workplace) -> None:
    lived(place, 0.5, 0.4)
    found = follow(place)
    assert found is not None
    assert (found.version, found.reference, found.decision.action) == ("v2", "v1", "grow")
    grown = place.ledger.canary()
    assert grown is not None
    assert grown.share == 0.8
    assert place.ledger.history()[-1].why == found.decision.why
    later = replace(place, clock=lambda: NOW + timedelta(hours=2))
    decided = follow(later)
    assert decided is not None
    assert decided.decision.action == "promote"
    assert (place.ledger.reference(), place.ledger.canary()) == ("v2", None)
    assert follow(later) is None


def test_a_canary_that_does_harm_is_withdrawn_with_its_figures(place: Workplace) -> None:
    lived(place, 0.3, 0.5)
    found = follow(place)
    assert found is not None
    last = place.ledger.history()[-1]
    assert (last.action, last.target, last.who, place.ledger.reference()) == (
        "withdraw",
        "v2",
        "canary",
        "v1",
    )
    assert last.why.startswith("worse: ")
    assert place.ledger.held()


def test_looking_changes_nothing_and_says_the_same_twice(place: Workplace) -> None:
    lived(place, 0.3, 0.5)
    assert look(place) == look(place)
    assert len(place.ledger.history()) == 2


def test_without_feedback_it_waits(place: Workplace) -> None:
    found = follow(place)
    assert found is not None
    assert (found.decision.action, found.decision.users) == ("wait", 0)


def test_a_move_that_another_made_first_is_left_at_that(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lived(place, 0.3, 0.5)
    read = place.ledger.canary()
    place.ledger.withdraw("v2", who="server", why="errors")
    monkeypatch.setattr(PromotionLedger, "canary", lambda _: read)  # as read a moment before
    follow(place)
    assert [entry.who for entry in place.ledger.history()] == ["test", "test", "server"]


def test_what_a_round_s_gate_passes_becomes_the_canary_once(place: Workplace) -> None:
    place.ledger.promote("v2", expects="v1", who="test", why="the round's parent")
    state = RoundState(
        round_id="r1", number=1, seed=1, device="cpu", threads=1, parent="v2", log_version=3, feedback=9,
        started_at=NOW.isoformat(), settings={},
        steps={"register": {"version": "v3"}, "gate": {"outcome": "promote", "why": "better"}},
    )  # fmt: skip
    assert RoundSteps(place, state)._ledger() == {"outcome": "canary", "why": "better"}
    assert RoundSteps(place, state)._ledger() == {"outcome": "canary", "why": "better"}
    canary = place.ledger.canary()
    assert canary is not None
    assert (canary.version, canary.share, place.ledger.reference()) == ("v3", 0.5, "v2")
    last = place.ledger.history()[-1]
    assert (last.action, last.who, last.why) == ("canary", "round r1", "better")
    another = RoundSteps(
        place, replace(state, round_id="r2", steps={**state.steps, "register": {"version": "v4"}})
    )
    outcome = another._ledger()
    assert outcome["outcome"] == "registered"
    assert "v3 is the canary" in outcome["why"]


class Killed(BaseException):
    """A SIGKILL, as far as the code between two system calls can tell."""


@pytest.mark.parametrize("linked", [False, True])
def test_a_look_that_is_killed_at_its_move_is_made_again_and_moves_once(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    lived(place, 0.5, 0.4)
    link = os.link

    def killed(source: Path, target: Path) -> None:
        if linked:
            link(source, target)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", killed)
        with pytest.raises(Killed):
            follow(place)
    follow(place)
    follow(place)
    assert [(entry.action, entry.share) for entry in place.ledger.history()] == [
        ("promote", None), ("canary", 0.5), ("canary", 0.8),
    ]  # fmt: skip


def test_what_a_canary_learned_from_is_kept(place: Workplace) -> None:
    for version in ("v1", "v2", "v3"):
        (place.home / "policies" / version).mkdir(parents=True)
    assert live_policies(place) == ["v1", "v2"]


def judged(folder: Path, *rows: object, since: int = 0, wanted: int = 2) -> dict[tuple[str, str], float]:
    snapshot = write_snapshot(folder, list(rows), EPOCH + timedelta(days=1))
    table = judged_versions(
        snapshot, FeatureSettings(), ("v1", "v2"), since=EPOCH + timedelta(minutes=since), judged=wanted
    )
    return {(one["user_id"], one["version"]): one["liked"] for one in table.to_pylist()}


def shown(item: str, *, at: float = 1, version: str = "v1", kind: str | None = "like") -> list[object]:
    served = row("served", item, at=at, policy_version=version, request_id="r")
    return [served, row(kind, item, at=at + 1)] if kind else [served]


def test_a_user_counts_with_the_first_items_that_have_a_level(tmp_path: Path) -> None:
    rows = [
        *shown("a", at=1),
        *shown("b", at=2, kind=None),
        *shown("c", at=3, kind="dislike"),
        *shown("d", at=4),
    ]
    assert judged(tmp_path, *rows) == {("u", "v1"): 0.5}
    assert judged(tmp_path / "three", *rows, wanted=3) == {("u", "v1"): pytest.approx(2 / 3)}
    assert judged(tmp_path / "four", *rows, wanted=4) == {}


def test_an_item_of_two_versions_of_before_or_of_an_open_window_counts_for_neither(tmp_path: Path) -> None:
    both = [*shown("a"), *shown("a", at=5, version="v2")]
    before = shown("b", at=-20)
    open_window = shown("c", at=24 * 60 - 10)
    rows = [*both, *before, *open_window, *shown("d"), *shown("e", at=2, kind="hide")]
    assert judged(tmp_path, *rows, wanted=1) == {("u", "v1"): 1.0}
    assert judged(tmp_path / "two", *rows, wanted=2) == {("u", "v1"): 0.5}
    assert judged(tmp_path / "three", *rows, wanted=3) == {}
