import random
from datetime import timedelta

import pytest

from features.duck import connect
from features.histories import HISTORY_SCHEMA, SEEN_SCHEMA, histories, recent_histories, seen
from features.settings import DatasetSettings, FeatureSettings
from tests.features.drawn_feedback import draw_rows
from tests.features.feedback_oracle import (
    EPOCH,
    all_in_force,
    distinct_latest,
    engaged,
    history_of,
    of_each_user,
    once,
    order,
    row,
    write_snapshot,
)

SETTINGS = FeatureSettings(
    history_length=3, history_look_back=5, duck={"threads": 1}, dataset=DatasetSettings(rows_per_shard=300)
)
WINDOW = timedelta(seconds=SETTINGS.attribution_window_s)
LATER = EPOCH + timedelta(days=1)


@pytest.fixture(scope="module")
def con():
    with connect(SETTINGS) as connection:
        yield connection


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    rows = draw_rows(random.Random(11), users=80, most=30)
    return rows, write_snapshot(tmp_path_factory.mktemp("crowd"), rows, LATER)


def sequences(table):
    assert table.schema == HISTORY_SCHEMA
    return {r["user_id"]: r["item_ids"] for r in table.to_pylist()}


def whole(mine, before):
    taken = sorted((e for e in mine if engaged(e) and e["occurred_at"] < before), key=order)
    return distinct_latest([e["item_id"] for e in taken])


@pytest.mark.parametrize("minutes", [None, 35])
def test_histories_hold_every_engaged_item_once_at_its_latest_place(con, crowd, minutes):
    rows, snapshot = crowd
    before = None if minutes is None else EPOCH + timedelta(minutes=minutes)
    expected = {user: whole(mine, before or LATER) for user, mine in of_each_user(once(rows)).items()}
    found = sequences(histories(con, snapshot, SETTINGS, before=before))
    assert found == {user: items for user, items in expected.items() if items}
    assert list(found) == sorted(found)


def test_recent_histories_are_what_a_sample_asked_for_now_would_hold(con, crowd):
    rows, snapshot = crowd
    expected = {
        user: history_of(mine, user, LATER, None, set(), SETTINGS.history_look_back, SETTINGS.history_length)
        for user, mine in of_each_user(once(rows)).items()
    }
    found = sequences(recent_histories(con, snapshot, SETTINGS))
    assert found == {user: items for user, items in expected.items() if items}


def test_histories_carry_the_time_and_the_level_in_force_of_each_item(con, crowd):
    rows, snapshot = crowd
    events = once(rows)
    forced = all_in_force(events, LATER, WINDOW)
    for r in histories(con, snapshot, SETTINGS).to_pylist():
        user = r["user_id"]
        assert r["times"] == [
            max(
                e["occurred_at"]
                for e in events
                if (e["user_id"], e["item_id"]) == (user, item) and engaged(e)
            )
            for item in r["item_ids"]
        ]
        levels = [forced.get((user, item)) for item in r["item_ids"]]
        assert r["levels"] == [decided and decided[0] for decided in levels]


def test_histories_of_some_users_are_those_of_all(con, crowd):
    _, snapshot = crowd
    some = sequences(histories(con, snapshot, SETTINGS, user_ids=["u4", "u41", "nobody"]))
    every = sequences(histories(con, snapshot, SETTINGS))
    assert some == {user: every[user] for user in ("u4", "u41")}


def test_a_late_event_takes_its_place_by_when_it_occurred(con, tmp_path):
    rows = [row("like", "b", at=10, offset=0), row("like", "a", at=5, delay=600, offset=1)]
    assert sequences(histories(con, write_snapshot(tmp_path, rows, LATER), SETTINGS)) == {"u": ["a", "b"]}


def test_a_disliking_review_is_no_engagement(con, tmp_path):
    rows = [row("review", "a", level=-1), row("review", "b", at=1, offset=1), row("dislike", "c", offset=2)]
    assert sequences(histories(con, write_snapshot(tmp_path, rows, LATER), SETTINGS)) == {"u": ["b"]}


def test_seen_is_every_event_but_served(con, tmp_path):
    rows = [
        row("served", "a"),
        row("served", "b", offset=1),
        row("impression", "b", offset=2),
        row("impression", "c", signed=False, offset=3),
        row("served", "a", "v", offset=4),
    ]
    table = seen(con, write_snapshot(tmp_path, rows, LATER))
    assert table.schema == SEEN_SCHEMA
    assert table.to_pylist() == [{"user_id": "u", "item_ids": ["b", "c"]}]
    assert seen(con, write_snapshot(tmp_path, rows, LATER), ["v"]).num_rows == 0


def test_an_empty_log_has_no_histories(con, tmp_path):
    snapshot = write_snapshot(tmp_path, [], None)
    assert histories(con, snapshot, SETTINGS).num_rows == 0
    assert recent_histories(con, snapshot, SETTINGS).schema == HISTORY_SCHEMA
    assert seen(con, snapshot).num_rows == 0
