"""The follower: the online store holds what the log holds, whatever order things land in and whoever dies."""

import random
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from deltalake import DeltaTable

from features.duck import connect
from features.in_force import levels_in_force
from features.interactions import Kind
from features.log import FeedbackLog, LogMissing
from features.online.contexts import OnlineFeatures
from features.online.follow import Follower, Step, follow
from features.online.position import Position, read_position
from features.online.repository import OnlineUnavailable
from features.settings import FeatureSettings, OnlineSettings
from tests.features.online.worlds import LEVEL_NAMES, Landing, history_of, random_events, seen_by, start

SETTINGS = FeatureSettings()


@pytest.fixture
def landing(tmp_path: Path) -> Landing:
    return Landing(FeedbackLog.open(tmp_path / "log"))


@pytest.fixture
def follower(tmp_path: Path) -> Callable[[], Follower]:
    return lambda: Follower(tmp_path / "log", tmp_path / "online", SETTINGS)


def reader(tmp_path: Path) -> OnlineFeatures:
    return OnlineFeatures.open(tmp_path / "online", SETTINGS.online)


def test_after_a_replay_every_users_features_equal_the_log(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    chance = random.Random(1)
    at = start()
    online = follower()
    for _ in range(4):
        at += timedelta(hours=1)
        landing.land(random_events(chance, 300, 40, at), at)
        online.step()
    users = [f"u{number}" for number in range(41)]  # u40 never did anything
    served = reader(tmp_path)
    found = served.contexts(users)
    with connect(SETTINGS) as con:
        snapshot = landing.log.snapshot()
        in_force = {
            (row["user_id"], row["item_id"]): row["level"]
            for row in levels_in_force(con, snapshot, SETTINGS).to_pylist()
        }
    assert [one.user_id for one in found] == users
    assert not found[-1].known
    for one in found[:-1]:
        assert list(one.history) == history_of(landing.rows, one.user_id)
        assert one.seen == seen_by(landing.rows, one.user_id)
        assert list(one.levels) == [LEVEL_NAMES[in_force.get((one.user_id, item))] for item in one.history]
        counts = reader_counts(served, one.user_id)
        assert counts == [
            sum(level == wanted for (user, _), level in in_force.items() if user == one.user_id)
            for wanted in (-1, 0, 1)
        ]


def users_of(step: Step | None) -> int:
    assert step is not None
    return step.users


def reader_counts(reader: OnlineFeatures, user: str) -> list[int]:
    known = reader.everything(user)
    return [known["disliked"], known["neutral"], known["liked"]]


def test_commits_that_landed_at_the_same_instant_are_all_online(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    online, at = follower(), start()
    landing.land([("u", "first", Kind.LIKE, at)], at)
    online.step()
    before = online.position.stamp
    landing.land([("u", "second", Kind.LIKE, at)], at)
    online.step()
    assert reader(tmp_path).contexts(["u"])[0].history == ("first", "second")
    assert before is not None
    assert online.position.stamp is not None
    assert online.position.stamp > before


def test_a_late_event_takes_its_place_in_the_history(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    online, at = follower(), start()
    landing.land([("u", "recent", Kind.LIKE, at)], at)
    online.step()
    landing.land([("u", "old", Kind.LIKE, at - timedelta(days=1))], at + timedelta(seconds=1))
    online.step()
    assert reader(tmp_path).contexts(["u"])[0].history == ("old", "recent")


def test_a_window_that_closes_changes_the_level_without_any_new_event(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    online, at = follower(), start()
    landing.land([("u", "passed over", Kind.IMPRESSION, at)], at)
    online.step()
    assert reader_counts(reader(tmp_path), "u") == [0, 0, 0]
    landing.land([], at, watermark=at + timedelta(seconds=SETTINGS.attribution_window_s))
    step = online.step()
    assert step is not None
    assert step.users == 1
    assert reader_counts(reader(tmp_path), "u") == [0, 1, 0]


def test_a_follower_killed_between_push_and_position_pushes_again_with_a_newer_stamp(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = start()
    landing.land([("u", "first", Kind.LIKE, at)], at)
    follower().step()
    landing.land([("u", "second", Kind.LIKE, at)], at)
    dying = follower()
    with monkeypatch.context() as patch:
        patch.setattr(Follower, "_push_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dying.step()
    left = read_position(tmp_path / "online" / "position.json")
    assert left.version == 1  # the push is not counted
    assert left.stamp == dying.position.stamp  # but its stamp is
    landing.land([("u", "third", Kind.LIKE, at)], at)
    again = follower()
    again.step()
    assert again.position.stamp is not None
    assert left.stamp is not None
    assert again.position.stamp > left.stamp
    assert reader(tmp_path).contexts(["u"])[0].history == ("first", "second", "third")


def test_only_touched_users_are_worked_out_and_compaction_touches_nobody(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    online, at = follower(), start()
    landing.land([(f"u{number}", "i", Kind.LIKE, at) for number in range(20)], at)
    assert users_of(online.step()) == 20
    landing.land([("u3", "j", Kind.LIKE, at)], at + timedelta(seconds=1))
    landing.land([("u4", "j", Kind.LIKE, at)], at + timedelta(seconds=2))
    assert users_of(online.step()) == 2
    DeltaTable(str(tmp_path / "log")).optimize.compact()
    step = online.step()
    assert step is not None
    assert step.users == step.items == 0
    assert online.step() is None


def test_commits_that_are_compacted_and_vacuumed_before_they_were_read_are_not_missed(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    online, at = follower(), start()
    landing.land([("u", "first", Kind.LIKE, at)], at)
    online.step()
    landing.land([("u", "second", Kind.LIKE, at)], at + timedelta(seconds=1))
    table = DeltaTable(str(tmp_path / "log"))
    table.optimize.compact()
    table.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    online.step()
    assert reader(tmp_path).contexts(["u"])[0].history == ("first", "second")


def test_another_log_under_the_same_path_starts_from_nothing(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    at = start()
    landing.land([("u", "old log", Kind.LIKE, at)], at)
    follower().step()
    (tmp_path / "log").rename(tmp_path / "gone")
    other = Landing(FeedbackLog.open(tmp_path / "log"))
    other.land([("u", "other log", Kind.LIKE, at)], at)
    follower().step()
    assert reader(tmp_path).contexts(["u"])[0].history == ("other log",)


def test_a_deleted_online_store_is_filled_again(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    at = start()
    landing.land([("u", "kept in the log", Kind.LIKE, at)], at)
    follower().step()
    for file in (tmp_path / "online").glob("online.db*"):
        file.unlink()
    (tmp_path / "online" / "applied.json").unlink()
    follower().step()
    assert reader(tmp_path).contexts(["u"])[0].history == ("kept in the log",)


def test_items_carry_what_was_said_about_them(
    tmp_path: Path, landing: Landing, follower: Callable[[], Follower]
) -> None:
    at = start()
    landing.land([("u", "i", Kind.LIKE, at), ("v", "i", Kind.DISLIKE, at), ("v", "i", Kind.SERVED, at)], at)
    online = follower()
    online.step()
    store = online._store
    names = ["item_disliked", "item_neutral", "item_liked", "item_events"]
    answer = store.get_online_features(
        features=[f"item_feedback:{name}" for name in names], entity_rows=[{"item_id": "i"}]
    ).to_dict()
    assert [answer[name][0] for name in names] == [1, 0, 1, 2]


def test_a_second_follower_is_refused(tmp_path: Path, landing: Landing) -> None:
    stop = threading.Event()
    first = threading.Thread(
        target=follow, args=(tmp_path / "log", tmp_path / "online", SETTINGS), kwargs={"stop": stop}
    )
    first.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "online" / "follow.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    try:
        with pytest.raises(OnlineUnavailable, match="another process already follows"):
            follow(tmp_path / "log", tmp_path / "online", SETTINGS, once=True)
    finally:
        stop.set()
        first.join()


def test_following_once_without_a_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(LogMissing, match="no feedback log"):
        follow(tmp_path / "nowhere", tmp_path / "online", SETTINGS, once=True)


def test_a_reaction_is_in_the_served_history_within_five_seconds(tmp_path: Path, landing: Landing) -> None:
    """p95 over 12 commits, every fifth event a day late, from its commit to the reader's answer."""
    landing.land([("u0", "i0", Kind.LIKE, start())], start())
    stop = threading.Event()
    settings = FeatureSettings(online=OnlineSettings(poll_seconds=0.1))
    thread = threading.Thread(
        target=follow, args=(tmp_path / "log", tmp_path / "online", settings), kwargs={"stop": stop}
    )
    thread.start()
    served = reader(tmp_path)
    waits = []
    try:
        for number in range(12):
            at = start() + timedelta(seconds=number)
            late = timedelta(days=1) if number % 5 == 0 else timedelta()
            user, item = f"u{number % 7}", f"new{number}"
            landing.land([(user, item, Kind.LIKE, at - late)], at)
            committed = time.monotonic()
            while item not in served.contexts([user])[0].history:
                assert time.monotonic() - committed < 20
                time.sleep(0.01)
            waits.append(time.monotonic() - committed)
    finally:
        stop.set()
        thread.join()
    assert sorted(waits)[int(len(waits) * 0.95)] < 5


def test_stamps_only_ever_grow() -> None:
    at = start()
    position = Position().stamped(at)
    assert position.stamp == at + timedelta(microseconds=1)
    for landed_at in (at, at - timedelta(days=1), None):
        after = position.stamped(landed_at)
        assert after.stamp is not None
        assert position.stamp is not None
        assert after.stamp > position.stamp
        position = after


def test_a_position_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "position.json").write_text("{}")
    with pytest.raises(OnlineUnavailable, match="delete it"):
        read_position(tmp_path / "position.json")
