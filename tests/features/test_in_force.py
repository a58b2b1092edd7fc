import random
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.duck import connect
from features.in_force import IN_FORCE_SCHEMA, level_counts, levels_in_force
from features.settings import DatasetSettings, FeatureSettings
from tests.features.drawn_feedback import draw_rows, draw_watermark
from tests.features.feedback_oracle import EPOCH, all_in_force, once, row, write_snapshot

SETTINGS = FeatureSettings(duck={"threads": 1}, dataset=DatasetSettings(rows_per_shard=500))
WINDOW = timedelta(seconds=SETTINGS.attribution_window_s)
LATER = EPOCH + timedelta(days=1)


@pytest.fixture(scope="module")
def con():
    with connect(SETTINGS) as connection:
        yield connection


def in_force(con, folder, rows, watermark=LATER, chosen=SETTINGS):
    table = levels_in_force(con, write_snapshot(folder, rows, watermark), chosen)
    assert table.schema == IN_FORCE_SCHEMA
    return {
        (r["user_id"], r["item_id"]): (r["level"], r["occurred_at"], r["arrived_at"])
        for r in table.to_pylist()
    }


def expected(rows, watermark, unsigned=False):
    forced = all_in_force(once(rows, unsigned), watermark, WINDOW)
    return {pair: (level, e["occurred_at"], e["arrived_at"]) for pair, (level, e) in forced.items()}


def level_of_a(con, folder, *rows, watermark=LATER):
    found = in_force(con, folder, list(rows), watermark).get(("u", "a"))
    return found and found[0]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.randoms(use_true_random=False))
def test_level_in_force_is_its_definition_for_whatever_arrives_in_whatever_order(con, tmp_path, pick):
    rows, watermark = draw_rows(pick, users=5, most=25), draw_watermark(pick)
    assert in_force(con, tmp_path, rows, watermark) == expected(rows, watermark)


def test_level_in_force_is_its_definition_for_a_crowd(con, tmp_path):
    pick = random.Random(7)
    rows = draw_rows(pick, users=150, most=30)
    for minutes in (45, 90):
        watermark = EPOCH + timedelta(minutes=minutes)
        assert in_force(con, tmp_path, rows, watermark) == expected(rows, watermark)


def test_unsigned_feedback_counts_only_when_the_setting_says_so(con, tmp_path):
    rows = draw_rows(random.Random(3), users=50, most=20)
    trusting = SETTINGS.model_copy(update={"dataset": DatasetSettings(learn_from_unsigned=True)})
    assert in_force(con, tmp_path, rows, LATER, trusting) == expected(rows, LATER, unsigned=True)
    assert expected(rows, LATER, unsigned=True) != expected(rows, LATER)


def test_an_impression_is_neutral_only_when_the_watermark_has_passed_its_window(con, tmp_path):
    impression = row("impression", at=0)
    window = SETTINGS.attribution_window_s / 60
    for minutes, level in ((window - 0.1, None), (window, 0)):
        watermark = EPOCH + timedelta(minutes=minutes)
        assert level_of_a(con, tmp_path, impression, watermark=watermark) == level
    assert level_of_a(con, tmp_path, impression, watermark=None) is None


def test_hours_of_ingest_downtime_do_not_turn_a_waiting_like_into_a_neutral(con, tmp_path):
    impression = row("impression", at=0)
    stale = EPOCH + timedelta(minutes=5)  # ingest stopped; the like waits in Kafka
    assert level_of_a(con, tmp_path, impression, watermark=stale) is None
    like = row("like", at=6, landed=200, offset=1)
    assert level_of_a(con, tmp_path, impression, like) == 1


def test_a_click_that_arrives_after_the_window_still_answers_its_impression(con, tmp_path):
    impression, click = row("impression", at=0), row("click", at=5, delay=300, offset=1)
    assert level_of_a(con, tmp_path, impression) == 0
    assert level_of_a(con, tmp_path, impression, click) is None


def test_a_click_after_the_window_does_not_answer_the_impression(con, tmp_path):
    assert level_of_a(con, tmp_path, row("impression", at=0), row("click", at=31, offset=1)) == 0


def test_served_is_not_seen(con, tmp_path):
    assert level_of_a(con, tmp_path, row("served", level=1)) is None


def test_explicit_beats_a_later_implicit_and_the_latest_explicit_wins(con, tmp_path):
    dislike, dwell = row("dislike", at=0), row("dwell", at=5, level=1, offset=1)
    assert level_of_a(con, tmp_path, dislike, dwell) == -1
    assert level_of_a(con, tmp_path, dislike, dwell, row("like", at=3, offset=2)) == 1


def test_of_explicit_events_at_the_same_time_the_later_landed_wins(con, tmp_path):
    like, dislike = row("like", at=0, offset=5), row("dislike", at=0, offset=6)
    assert level_of_a(con, tmp_path, dislike, like) == -1


def test_a_forged_copy_does_not_push_out_the_event_it_copies(con, tmp_path):
    forged = row("dislike", at=0, event_id="x", signed=False, offset=0)
    real = row("like", at=0, event_id="x", signed=True, offset=1)
    assert level_of_a(con, tmp_path, forged, real) == 1


def test_an_empty_log_has_no_levels(con, tmp_path):
    snapshot = write_snapshot(tmp_path, [], None)
    assert levels_in_force(con, snapshot, SETTINGS).num_rows == 0
    assert level_counts(con, snapshot, SETTINGS) == {"liked": 0, "neutral": 0, "disliked": 0}


def test_levels_of_some_users_are_those_of_all(con, tmp_path):
    rows = draw_rows(random.Random(5), users=20, most=20)
    snapshot = write_snapshot(tmp_path, rows, LATER)
    every = levels_in_force(con, snapshot, SETTINGS).to_pylist()
    some = levels_in_force(con, snapshot, SETTINGS, user_ids=["u3", "u11", "nobody"]).to_pylist()
    assert some == [r for r in every if r["user_id"] in ("u3", "u11")]
    assert some
    counts = level_counts(con, snapshot, SETTINGS)
    assert sum(counts.values()) == len(every)
    assert counts["liked"] == sum(r["level"] == 1 for r in every)
