"""A refresh on bad data waits for a person, and says why."""

from datetime import UTC, datetime, timedelta

import pytest

from features.settings import FeatureSettings, QualitySettings
from tests.features.feedback_oracle import write_snapshot
from tests.features.test_quality import BAD_DAYS, CHOSEN, END, days
from trainer.data_hold import DataHeld, DataHold, NothingHeld

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A log of whose last day one user holds too much."""
    return write_snapshot(tmp_path_factory.mktemp("bad"), days(1, BAD_DAYS["user"]), END)


def hold(tmp_path, chosen=CHOSEN):
    return DataHold(tmp_path / "home", chosen, lambda: NOW)


def test_data_out_of_bounds_holds_until_a_person_accepts_it(tmp_path, bad):
    with pytest.raises(DataHeld, match=r"user greedy sent 11% of the last period's events.*quality accept"):
        hold(tmp_path).require(bad)
    assert "greedy" in hold(tmp_path).last()["held"][0]
    verdict = hold(tmp_path).accept(bad, who="ann", why="our own load test")
    assert (verdict.held, len(verdict.accepted)) == ((), 1)
    hold(tmp_path).require(bad)
    assert hold(tmp_path).last()["held"] == []


def test_what_was_accepted_is_no_leave_for_another_breach_or_a_later_day(tmp_path, bad):
    hold(tmp_path).accept(bad, who="ann", why="a test")
    other = write_snapshot(tmp_path / "other", days(1, BAD_DAYS["volume"]), END, version=1)
    with pytest.raises(DataHeld):
        hold(tmp_path).require(other)
    later = [
        event | {name: event[name] + timedelta(days=2) for name in ("occurred_at", "arrived_at", "landed_at")}
        for event in days(1, BAD_DAYS["user"])
    ]
    with pytest.raises(DataHeld):
        hold(tmp_path).require(write_snapshot(tmp_path / "later", later, END + timedelta(days=2), version=2))


def test_with_the_hold_off_breaches_are_only_reported(tmp_path, bad):
    quality = QualitySettings(min_events=100, hold=False)
    verdict = hold(tmp_path, FeatureSettings(duck={"threads": 1}, quality=quality)).look(bad)
    assert verdict.held == ()
    assert [one.code for one in verdict.report.breaches] == ["user"]


def test_there_is_nothing_to_accept_on_ordinary_days(tmp_path):
    with pytest.raises(NothingHeld, match="within its bounds"):
        hold(tmp_path).accept(write_snapshot(tmp_path / "log", days(1), END), who="ann", why="x")


def test_a_forgotten_user_is_named_in_no_verdict(tmp_path, bad):
    hold(tmp_path).accept(bad, who="ann", why="a test")
    hold(tmp_path).forget("somebody else")
    assert hold(tmp_path).last() is not None
    hold(tmp_path).forget("greedy")
    assert not any("greedy" in file.read_text() for file in (tmp_path / "home").rglob("*.json"))
