"""Compaction and vacuum: rows, offsets and every version that a manifest names stay."""

import fcntl
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import FeaturesError
from features.log import LOG_SCHEMA, FeedbackLog, LogSnapshot, offsets_app, watermark_app
from features.manifest import Manifest, StageCounts, write_manifest
from features.settings import UpkeepSettings
from features.upkeep import compact, forget_commits, keep_up, vacuum

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
APP, MARK = offsets_app("c", "t", 0), watermark_app("c", "t", 0)
EAGER = UpkeepSettings(compact_from_files=2, retention_hours=0)


def land(log: FeedbackLog, *offsets: int) -> None:
    for offset in offsets:
        row = {
            "event_id": f"e{offset}", "user_id": "u", "landed_on": NOW.date(),
            "kafka_partition": 0, "kafka_offset": offset,
        }  # fmt: skip
        table = pa.Table.from_pylist([row], schema=LOG_SCHEMA)
        log.append(table, {APP: offset, MARK: 1000 * (offset + 1)})


def offsets_of(snapshot: LogSnapshot) -> list[int]:
    return sorted(
        offset for file in snapshot.files for offset in pq.read_table(file)["kafka_offset"].to_pylist()
    )


def name_version(datasets: Path, version: int) -> None:
    folder = datasets / f"d{version}"
    folder.mkdir(parents=True)
    stage = StageCounts(samples=0, by_role={}, refused={}, rows_hash="")
    write_manifest(
        folder,
        Manifest(
            format=1, dataset_id=folder.name, log_version=version, watermark=None, since=None, rules_hash="",
            queries_hash="", settings={}, rows=0, users=0, unsigned=0, duplicates=0, likes=0,
            stages={"easy": stage, "hard": stage}, warnings=[], built_at=NOW,
        ),
    )  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> FeedbackLog:
    log = FeedbackLog.open(tmp_path / "log", checkpoint_interval=4)
    log.transaction_version(APP)
    return log


def test_compaction_keeps_rows_offsets_and_watermark_and_the_writer_goes_on(log: FeedbackLog) -> None:
    land(log, *range(10))
    assert compact(log, EAGER)
    land(log, 10)  # the writer's handle is older than the compaction: no conflict, no repeat
    fresh = FeedbackLog.open(log.uri)
    snapshot = fresh.snapshot()
    assert len(snapshot.files) == 2
    assert offsets_of(snapshot) == list(range(11))
    assert fresh.transaction_version(APP) == 10
    assert snapshot.watermark == datetime.fromtimestamp(11, UTC)


def test_few_small_files_are_left_alone(log: FeedbackLog) -> None:
    land(log, *range(5))
    before = log.version
    assert not compact(log, UpkeepSettings(compact_from_files=6))
    assert FeedbackLog.open(log.uri).version == before


def test_vacuum_keeps_what_manifests_name_and_nothing_else(log: FeedbackLog, tmp_path: Path) -> None:
    land(log, *range(6))
    name_version(tmp_path / "datasets", 3)
    compact(log, EAGER)
    deleted, kept = vacuum(log, tmp_path / "datasets", EAGER)
    assert kept == (3,)
    assert len(deleted) == 3  # versions 4 to 6 added one file each
    assert offsets_of(log.snapshot(3)) == [0, 1, 2]
    assert offsets_of(log.snapshot()) == list(range(6))
    with pytest.raises(FileNotFoundError):
        offsets_of(log.snapshot(6))


def test_files_younger_than_the_retention_stay(log: FeedbackLog, tmp_path: Path) -> None:
    land(log, *range(4))
    compact(log, EAGER)
    deleted, _ = vacuum(log, tmp_path / "datasets", UpkeepSettings(retention_hours=24))
    assert deleted == []
    assert offsets_of(log.snapshot(4)) == list(range(4))


def test_what_a_killed_writer_left_behind_goes_when_it_is_old(log: FeedbackLog, tmp_path: Path) -> None:
    land(log, 0)
    folder = Path(log.snapshot().files[0]).parent
    old, young = folder / "part-old.snappy.parquet", folder / "part-young.snappy.parquet"
    for file in (old, young):
        file.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    vacuum(log, tmp_path / "datasets", UpkeepSettings(retention_hours=24))
    assert not old.exists()
    assert young.exists()
    assert offsets_of(log.snapshot()) == [0]


def test_a_manifest_nobody_can_read_stops_the_vacuum(log: FeedbackLog, tmp_path: Path) -> None:
    land(log, *range(4))
    compact(log, EAGER)
    folder = tmp_path / "datasets" / "d"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(FeaturesError, match=r"manifest\.json"):
        vacuum(log, tmp_path / "datasets", EAGER)
    assert offsets_of(log.snapshot(4)) == list(range(4))


def age(log: FeedbackLog, versions: range) -> None:
    forty_days_ago = time.time() - 40 * 86_400
    for version in versions:
        for file in (Path(log.uri) / "_delta_log").glob(f"{version:020d}.*"):
            os.utime(file, (forty_days_ago, forty_days_ago))


def test_old_commits_are_forgotten_and_the_log_reads_as_before(log: FeedbackLog) -> None:
    land(log, *range(20))
    age(log, range(13))
    assert forget_commits(log, (), datetime.now(UTC))
    fresh = FeedbackLog.open(log.uri)
    assert offsets_of(fresh.snapshot()) == list(range(20))
    assert fresh.snapshot().watermark == datetime.fromtimestamp(20, UTC)
    assert offsets_of(fresh.snapshot(15)) == list(range(15))
    with pytest.raises(FeaturesError, match="cannot be read any more"):
        fresh.snapshot(2)
    land(log, 20)
    assert offsets_of(log.snapshot()) == list(range(21))


def test_a_manifest_of_an_old_version_keeps_the_commits(log: FeedbackLog) -> None:
    land(log, *range(20))
    age(log, range(13))
    assert not forget_commits(log, (2, 19), datetime.now(UTC))
    assert offsets_of(log.snapshot(2)) == [0, 1]


def test_there_is_one_owner_at_a_time(log: FeedbackLog, tmp_path: Path) -> None:
    land(log, *range(4))
    lock = tmp_path / "upkeep.lock"
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not keep_up(log, tmp_path / "datasets", lock, EAGER).owner
    report = keep_up(log, tmp_path / "datasets", lock, EAGER)
    assert (report.owner, report.compacted, report.files_before, report.files_after) == (True, True, 4, 1)
    assert report.deleted == 4
    idle = FeedbackLog.open(log.uri).version
    assert keep_up(log, tmp_path / "datasets", lock, EAGER).deleted == 0
    assert FeedbackLog.open(log.uri).version == idle  # nothing to do is no commit
