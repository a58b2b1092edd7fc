"""The feedback log: offsets travel with the rows, a stale writer is refused, snapshots are pinned."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from features.duck import connect, view_of
from features.log import (
    LOG_SCHEMA,
    FeedbackLog,
    LogConflict,
    LogMismatch,
    LogMissing,
    LogUnwritable,
    offsets_app,
    partitions_app,
    watermark_app,
    watermark_of,
)
from features.settings import FeatureSettings

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
P0, P1 = offsets_app("c", "interactions", 0), offsets_app("c", "interactions", 1)
W0, W1 = watermark_app("c", "interactions", 0), watermark_app("c", "interactions", 1)


def rows(*offsets: int, partition: int = 0) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "event_id": f"e{partition}-{offset}", "user_id": "u", "item_id": f"i{offset}", "kind": "like",
                "occurred_at": NOW, "level": 1, "rules": "r", "schema_version": "1.0", "arrived_at": NOW,
                "landed_at": NOW, "landed_on": NOW.date(),
                "kafka_partition": partition, "kafka_offset": offset,
            }
            for offset in offsets
        ],
        schema=LOG_SCHEMA,
    )  # fmt: skip


@pytest.fixture
def con() -> Iterator[duckdb.DuckDBPyConnection]:
    with connect(FeatureSettings()) as con:
        yield con


def offsets_in(con: duckdb.DuckDBPyConnection, log: FeedbackLog, version: int | None = None) -> list[int]:
    view_of(con, "log", log.snapshot(version))
    return [row[0] for row in con.execute("select kafka_offset from log order by 1").fetchall()]


def test_rows_and_offsets_are_committed_as_one(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    assert log.transaction_version(P0) is None
    log.append(rows(0, 1, 2), {P0: 2, W0: 1000})
    log.append(rows(3), {P0: 3, W0: 2000})
    again = FeedbackLog.open(tmp_path / "log", create=False)
    assert again.transaction_version(P0) == 3
    assert offsets_in(con, again) == [0, 1, 2, 3]
    assert offsets_in(con, again, version=1) == [0, 1, 2]
    assert again.snapshot(1).watermark == datetime.fromtimestamp(1, UTC)


def test_a_row_comes_back_as_it_went_in(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    log.append(rows(7), {})
    view_of(con, "log", log.snapshot())
    read = con.sql("select * from log").to_arrow_table()
    assert read.column_names == LOG_SCHEMA.names
    assert read.cast(LOG_SCHEMA).to_pylist() == rows(7).to_pylist()


def test_a_view_of_an_empty_log_has_the_columns_and_no_rows(
    tmp_path: Path, con: duckdb.DuckDBPyConnection
) -> None:
    log = FeedbackLog.open(tmp_path / "it's a 50% lög")
    view_of(con, "log", log.snapshot())
    empty = con.sql("select * from log").to_arrow_table()
    assert (empty.num_rows, empty.column_names) == (0, LOG_SCHEMA.names)
    log.append(rows(1), {})
    assert offsets_in(con, log) == [1]
    full = con.sql("select * from log").to_arrow_table()
    assert full.schema.types == empty.schema.types


def test_two_writers_of_one_partition_conflict(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    first, second = (FeedbackLog.open(tmp_path / "log") for _ in range(2))
    assert first.transaction_version(P0) is second.transaction_version(P0) is None
    first.append(rows(0, 1), {P0: 1})
    with pytest.raises(LogConflict):
        second.append(rows(0, 1), {P0: 1})
    assert offsets_in(con, first) == [0, 1]


def test_writers_of_different_partitions_do_not_conflict(
    tmp_path: Path, con: duckdb.DuckDBPyConnection
) -> None:
    first, second = (FeedbackLog.open(tmp_path / "log") for _ in range(2))
    first.transaction_version(P0)
    second.transaction_version(P1)
    for n in range(5):
        first.append(rows(n), {P0: n})
        second.append(rows(n, partition=1), {P1: n})
    assert offsets_in(con, first) == sorted([*range(5), *range(5)])


def test_a_lost_partition_is_noticed_after_the_handle_moved_on(
    tmp_path: Path, con: duckdb.DuckDBPyConnection
) -> None:
    """Delta's own check is disarmed by the append to P1: it moves the handle past the thief's commit."""
    loser, thief = (FeedbackLog.open(tmp_path / "log") for _ in range(2))
    loser.transaction_version(P0)
    loser.transaction_version(P1)
    thief.transaction_version(P0)
    thief.append(rows(0, 1, 2), {P0: 2})
    loser.append(rows(0, partition=1), {P1: 0})
    with pytest.raises(LogConflict, match="reopen"):
        loser.append(rows(0, 1), {P0: 1})
    assert offsets_in(con, thief) == [0, 0, 1, 2]


def test_a_fresh_handle_must_read_before_it_appends(tmp_path: Path, con: duckdb.DuckDBPyConnection) -> None:
    FeedbackLog.open(tmp_path / "log").append(rows(), {})
    writer = FeedbackLog.open(tmp_path / "log")
    writer.transaction_version(P0)
    writer.append(rows(0, 1), {P0: 1})
    fresh = FeedbackLog.open(tmp_path / "log")
    with pytest.raises(LogConflict, match="read its transaction_version"):
        fresh.append(rows(0, 1), {P0: 1})
    assert fresh.transaction_version(P0) == 1  # so the next offset to read is 2: nothing comes twice
    writer.refresh()
    with pytest.raises(LogConflict, match="read its transaction_version"):
        writer.append(rows(2), {P0: 2})
    assert offsets_in(con, fresh) == [0, 1]


def test_offsets_and_watermarks_never_move_backwards(tmp_path: Path) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    log.transaction_version(P0)
    log.append(rows(0, 1), {P0: 1, W0: 5})
    with pytest.raises(LogConflict, match="backwards"):
        log.append(rows(0), {P0: 0})
    log.append(rows(), {W0: 5})
    with pytest.raises(LogConflict, match="backwards"):
        log.append(rows(), {W0: 4})


def test_an_idle_partition_advances_the_watermark_without_rows(tmp_path: Path) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    log.transaction_version(P0)
    log.transaction_version(P1)
    log.append(rows(0), {P0: 0, W0: 9000, P1: 4, W1: 3000})
    assert log.snapshot().watermark == datetime.fromtimestamp(3, UTC)
    log.append(rows(), {W1: 20_000})
    assert log.snapshot().watermark == datetime.fromtimestamp(9, UTC)


def test_the_watermark_is_found_behind_checkpoints_and_compactions(tmp_path: Path) -> None:
    log = FeedbackLog.open(tmp_path / "log", checkpoint_interval=3)
    log.transaction_version(P0)
    log.transaction_version(P1)
    log.append(rows(0, partition=1), {P1: 0, W1: 50_000})
    marks = [log.snapshot(n).watermark for n in range(2)]
    for n in range(10):
        log.append(rows(n), {P0: n, W0: (n + 1) * 1000})
        marks.append(log.snapshot().watermark)
    log.table.optimize.compact()
    fresh = FeedbackLog.open(tmp_path / "log")
    assert fresh.snapshot().watermark == datetime.fromtimestamp(10, UTC)
    assert [fresh.snapshot(n).watermark for n in range(12)] == marks


def test_the_watermark_waits_for_every_partition_of_the_topic() -> None:
    both = partitions_app("c", "t")
    assert watermark_of({}) is None
    assert watermark_of({both: 2, "c/t/0": 1, "c/t/0#watermark": 1000}) is None
    assert watermark_of({"c/t/0": 1}) is None
    full = {both: 2, "c/t/0#watermark": 1000, "c/t/1#watermark": 2000}
    assert watermark_of(full) == datetime.fromtimestamp(1, UTC)


def test_a_replaced_broker_does_not_hold_the_watermark_back() -> None:
    old = {"old/t/0": 99, "old/t/0#watermark": 1000, "old/t/1": 5}
    assert watermark_of(old | {"new/t/0": 3, "new/t/0#watermark": 5000}) == datetime.fromtimestamp(5, UTC)


def test_a_missing_log_a_foreign_table_and_an_unknown_version_are_said(tmp_path: Path) -> None:
    with pytest.raises(LogMissing, match="no feedback log"):
        FeedbackLog.open(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    DeltaTable.create(tmp_path / "other", pa.schema([("x", pa.int32())]))
    with pytest.raises(LogMismatch, match="event_id"):
        FeedbackLog.open(tmp_path / "other")
    with pytest.raises(Exception, match="no version 7"):
        FeedbackLog.open(tmp_path / "log").snapshot(7)


def test_a_store_that_cannot_be_written_is_an_error_and_loses_nothing(
    tmp_path: Path, con: duckdb.DuckDBPyConnection
) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    log.transaction_version(P0)
    log.append(rows(0), {P0: 0})
    folder = tmp_path / "log" / "landed_on=2026-05-01"
    folder.rename(tmp_path / "aside")
    folder.write_text("a file where the folder should be")
    with pytest.raises(LogUnwritable, match="cannot be written"):
        log.append(rows(1), {P0: 1})
    folder.unlink()
    (tmp_path / "aside").rename(folder)
    log.refresh()
    assert log.transaction_version(P0) == 0
    log.append(rows(1), {P0: 1})
    assert offsets_in(con, log) == [0, 1]


def test_a_write_that_cannot_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(LogUnwritable, match="No space left"):
        log.append(rows(0), {})
    monkeypatch.undo()
    log.append(rows(0), {})
    assert log.version == 1
