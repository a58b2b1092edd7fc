"""The past of the online features: Feast's historical retrieval equals the point-in-time query."""

import random
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from features.duck import connect
from features.histories import recent_histories, seen
from features.interactions import Kind
from features.log import FeedbackLog
from features.online.exports import NothingExported, export, history_at
from features.settings import FeatureSettings, OnlineSettings
from tests.features.online.worlds import Landing, history_of, random_events, seen_by, start

EVERY_COMMIT = FeatureSettings(online=OnlineSettings(export_seconds=0))


def test_what_feast_says_was_known_equals_the_log_strictly_before(tmp_path: Path) -> None:
    chance, at = random.Random(2), start()
    landing = Landing(FeedbackLog.open(tmp_path / "log"))
    landings, versions = [], []
    for _ in range(5):
        at += timedelta(minutes=chance.choice([0, 30]))  # some commits land at the same instant
        landing.land(random_events(chance, 60, 12, at), at)
        landings.append(at)
        versions.append(landing.log.version)
        if len(landings) == 3:
            export(tmp_path / "log", tmp_path / "online", EVERY_COMMIT)  # the rest goes on from here
    export(tmp_path / "log", tmp_path / "online", EVERY_COMMIT)
    instants = [when + step for when in sorted(set(landings)) for step in (timedelta(), timedelta(minutes=1))]
    asked = pa.table(
        {
            "user_id": [f"u{user}" for user in range(12) for _ in instants],
            "asked_at": pa.array(instants * 12, pa.timestamp("us", "UTC")),
        }
    )
    answer = history_at(tmp_path / "online", EVERY_COMMIT.online, asked).to_pylist()
    assert len(answer) == asked.num_rows
    for row in answer:
        known = seen_by(landing.rows, row["user_id"], landed_before=row["asked_at"])
        assert list(row["item_ids"] or []) == history_of(
            landing.rows, row["user_id"], landed_before=row["asked_at"]
        )
        assert set(row["seen_ids"] or []) == known

    # And equal to the store's own queries on the log as it was then.
    with connect(EVERY_COMMIT) as con:
        for when in sorted(set(landings)):
            version = max(v for v, landed in zip(versions, landings, strict=True) if landed <= when)
            snapshot = landing.log.snapshot(version)
            histories = {
                row["user_id"]: row["item_ids"]
                for row in recent_histories(con, snapshot, EVERY_COMMIT).to_pylist()
            }
            met = {row["user_id"]: row["item_ids"] for row in seen(con, snapshot).to_pylist()}
            for row in answer:
                if row["asked_at"] == when + timedelta(minutes=1):
                    assert list(row["item_ids"] or []) == histories.get(row["user_id"], [])
                    assert list(row["seen_ids"] or []) == met.get(row["user_id"], [])


def test_slots_keep_one_state_of_a_user_each(tmp_path: Path) -> None:
    landing = Landing(FeedbackLog.open(tmp_path / "log"))
    settings = FeatureSettings(online=OnlineSettings(export_seconds=60))
    for second in (0, 10, 20, 70, 80):
        at = start() + timedelta(seconds=second)
        landing.land([("u", f"i{second}", Kind.LIKE, at)], at)
    written = export(tmp_path / "log", tmp_path / "online", settings)
    assert (written.states, written.version) == (2, landing.log.version)
    asked = pa.table(
        {
            "user_id": ["u"] * 3,
            "asked_at": pa.array(
                [start() + timedelta(seconds=second) for second in (15, 60, 90)], pa.timestamp("us", "UTC")
            ),
        }
    )
    answer = history_at(tmp_path / "online", settings.online, asked).sort_by("asked_at").to_pylist()
    assert [list(row["item_ids"] or []) for row in answer] == [
        [],
        ["i0", "i10", "i20"],
        ["i0", "i10", "i20", "i70", "i80"],
    ]
    assert export(tmp_path / "log", tmp_path / "online", settings).states == 0


def test_asking_before_any_export_names_the_command(tmp_path: Path) -> None:
    asked = pa.table({"user_id": ["u"], "asked_at": pa.array([start()], pa.timestamp("us", "UTC"))})
    with pytest.raises(NothingExported, match="features export"):
        history_at(tmp_path / "online", OnlineSettings(), asked)
