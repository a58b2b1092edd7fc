"""What is old enough ages out; what a live policy needs stays, and a clock that is behind deletes nothing."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from align3gr.retention import age_out_home
from align3gr.settings import Settings
from features.datasets import PreferenceDataset
from features.duck import connect, view_of
from features.errors import BadInput
from features.interactions import Kind
from features.log import FeedbackLog
from features.online.contexts import OnlineFeatures
from features.online.follow import follow
from features.retention import ClockBehind
from features.settings import DatasetSettings, FeatureSettings, RetentionSettings, UpkeepSettings
from features.upkeep import keep_up
from tests.features.online.worlds import Landing, start
from tests.trainer.round_world import LATER, POLICIES, TRAINER, workplace
from trainer.reproduction import ManifestGone, snapshot_or_gone

FEATURES = FeatureSettings(retention=RetentionSettings(log_days=30, dataset_days=60))
EAGER = UpkeepSettings(compact_from_files=2, retention_hours=0)


def users_in(home: Path) -> set[str]:
    with connect(FeatureSettings()) as con:
        view_of(con, "log", FeedbackLog.open(home / "log").snapshot())
        return {user for (user,) in con.execute("select distinct user_id from log").fetchall()}


def days_of_feedback(home: Path, days: int) -> None:
    """A user a day, and one who is there every day."""
    landing = Landing(FeedbackLog.open(home / "log"))
    for day in range(days):
        at = start() + timedelta(days=day)
        landing.land([(f"day-{day}", "i", Kind.LIKE, at), ("always", f"i{day}", Kind.LIKE, at)], at)


def settings(home: Path, features: FeatureSettings = FEATURES) -> Settings:
    return Settings(home=home, features=features, policies=POLICIES, trainer=TRAINER)


def test_days_that_landed_long_ago_leave_log_and_online_store(tmp_path: Path) -> None:
    home = tmp_path / "home"
    days_of_feedback(home, 40)
    follow(home / "log", home / "online", FEATURES, once=True)
    now = start() + timedelta(days=40)
    aged = age_out_home(settings(home), workplace(home, clock=lambda: now))
    assert len(aged.days) == 10
    assert aged.users == sorted(f"day-{day}" for day in range(10))
    assert users_in(home) == {"always", *(f"day-{day}" for day in range(10, 40))}
    follow(home / "log", home / "online", FEATURES, once=True)
    old, young = OnlineFeatures.open(home / "online", FEATURES.online).contexts(["day-3", "day-33"])
    assert not old.known
    assert young.known
    assert age_out_home(settings(home), workplace(home, clock=lambda: now)).days == []
    days_left = keep_up(FeedbackLog.open(home / "log"), home / "datasets", home / "upkeep.lock", EAGER)
    assert days_left.deleted >= 10


def test_nothing_ages_out_unless_it_is_set_and_the_newest_day_stays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    days_of_feedback(home, 3)
    later = workplace(home, clock=lambda: start() + timedelta(days=4000))
    assert age_out_home(settings(home, FeatureSettings()), later).days == []
    assert len(age_out_home(settings(home), later).days) == 2
    assert users_in(home) == {"always", "day-2"}


def test_a_clock_that_went_backwards_deletes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    days_of_feedback(home, 40)
    with pytest.raises(ClockBehind, match="set this machine's clock; nothing was deleted") as refused:
        age_out_home(settings(home), workplace(home, clock=lambda: start() + timedelta(days=5)))
    assert isinstance(refused.value, BadInput)
    assert len(users_in(home)) == 41


def test_a_live_policys_dataset_and_its_version_of_the_log_stay(home: Path) -> None:
    now = LATER + timedelta(days=4000)
    place = workplace(home, clock=lambda: now)
    live = place.rounds.read("r0001").steps["dataset"]["dataset_id"]
    other = PreferenceDataset.build(
        FeedbackLog.open(home / "log").snapshot(),
        FeatureSettings(dataset=DatasetSettings(max_samples_per_user=3)),
        home / "datasets",
        clock=lambda: LATER,
    )
    Landing(FeedbackLog.open(home / "log")).land([("late", "item-001", Kind.LIKE, now)], now)
    aged = age_out_home(settings(home), place)
    assert aged.datasets == [other.dataset_id]
    assert users_in(home) == {"late"}
    log = FeedbackLog.open(home / "log")
    keep_up(log, home / "datasets", home / "upkeep.lock", EAGER, now=now)
    snapshot_or_gone(place, place.rounds.read("r0001"))  # v2, which learned from it, is the reference
    PreferenceDataset.open(home / "datasets" / live).verify()
    # Nobody may go back to v2: its dataset goes, and with it the version.
    shutil.rmtree(home / "policies" / "v2")
    assert age_out_home(settings(home), place).datasets == [live]
    keep_up(log, home / "datasets", home / "upkeep.lock", EAGER, now=now)
    with pytest.raises(ManifestGone):
        snapshot_or_gone(place, place.rounds.read("r0001"))
