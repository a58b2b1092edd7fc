"""The past of the online features as Parquet, so that Feast can say what was known at any instant.

For every slot of landing time (``online.export_seconds``; 0: every commit) the values of whoever changed are
worked out on the log *as it was then* (a pinned version), by the queries that the follower pushes with. A
state counts from one microsecond after its last event landed, and creation and event time are the same: the
join sees neither what landed at the very instant nor a late correction.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ..duck import connect, view_of
from ..errors import BadInput, FeaturesError
from ..log import LOG_SCHEMA, FeedbackLog, LogSnapshot
from ..settings import FeatureSettings, OnlineSettings
from .changes import added_files, log_id
from .definitions import CONTEXT_SERVICE, CREATED_AT, ITEM_EXPORT, KNOWN_AT, USER_EXPORT
from .position import Position, read_position, write_position
from .repository import exclusive, open_store
from .values import Touched, each_user_values, everything, item_values, touched

log = logging.getLogger(__name__)


class NothingExported(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """Historical features were asked for before the first export."""


@dataclass(frozen=True)
class Exported:
    """What one export wrote."""

    version: int
    states: int
    """Rows: one a user and slot in which something changed for that user."""
    slots: int


def export(
    log_uri: str | Path,
    folder: Path,
    settings: FeatureSettings,
    *,
    storage_options: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the states since the last export to ``folder/exports``; a killed export goes on where it was.

    Raises LogMissing, and OnlineUnavailable while another export runs.
    """
    exports = folder / "exports"
    with exclusive(exports / "export.lock", wait=False):
        feedback = FeedbackLog.open(log_uri, create=False, storage_options=storage_options)
        position = read_position(exports / "position.json")
        identity = log_id(feedback)
        if position.log_id != identity:
            _clear(exports)
            position = Position(log_id=identity)
        states = slots = 0
        con = connect(settings)
        newest = feedback.snapshot().version
        for snapshot, added, landed_at in _slots(con, feedback, position.version, newest, settings):
            changed = _changed(con, snapshot, added, settings, position)
            position = position.stamped(landed_at or snapshot.watermark)
            assert position.stamp is not None, "stamped() gives one"
            for part, values in enumerate(each_user_values(con, snapshot, settings, changed.users)):
                states += values.num_rows
                _write(exports / USER_EXPORT, f"{snapshot.version:020d}-{part:04d}", values, position.stamp)
            if changed.items is None or changed.items:
                items = item_values(con, snapshot, changed.items)
                _write(exports / ITEM_EXPORT, f"{snapshot.version:020d}", items, position.stamp)
            position = replace(position, version=snapshot.version, watermark=snapshot.watermark)
            write_position(exports / "position.json", position)
            slots += 1
            if progress is not None:
                progress(snapshot.version, newest)
        return Exported(position.version, states, slots)


def history_at(folder: Path, settings: OnlineSettings, asked: pa.Table) -> pa.Table:
    """Feast's historical retrieval: the prompt context of each row of ``asked`` (``user_id, asked_at``).

    What was known strictly before ``asked_at``; null for a user of whom nothing was. Columns ``user_id,
    asked_at`` and the features of the context's views. Raises NothingExported.
    """
    if not any((folder / "exports" / USER_EXPORT).glob("*.parquet")):
        raise NothingExported(f"nothing is exported in {folder}; run align3gr features export first")
    store = open_store(folder, settings)
    frame = asked.to_pandas().rename(columns={"asked_at": "event_timestamp"})
    job = store.get_historical_features(
        entity_df=frame,
        features=store.get_feature_service(CONTEXT_SERVICE),
        filter_by_created_timestamp=True,
    )
    answer: pa.Table = job.to_arrow()
    return answer.rename_columns(
        ["asked_at" if name == "event_timestamp" else name for name in answer.column_names]
    )


def _slots(
    con: duckdb.DuckDBPyConnection,
    feedback: FeedbackLog,
    after: int,
    newest: int,
    settings: FeatureSettings,
) -> Iterator[tuple[LogSnapshot, list[str] | None, datetime | None]]:
    """(snapshot at the slot's end, files added in it or None when that is unknown, newest landing in it)."""
    seconds = settings.online.export_seconds
    added: list[str] | None = []
    landed: datetime | None = None
    slot: int | None = None
    last = after
    for version in range(max(after, -1) + 1, newest + 1):
        here = added_files(feedback, version - 1, version)
        landed_here = _landed(con, here.files) if here.complete else None
        slot_here = int(landed_here.timestamp() // seconds) if landed_here and seconds else None
        ended = slot is not None and slot_here is not None and slot_here != slot
        if last > after and (seconds == 0 or ended) and version - 1 >= 0:
            yield feedback.snapshot(version - 1), added, landed
            added, landed = [], None
        slot = slot_here if slot_here is not None else slot
        added = added + here.files if added is not None and here.complete else None
        landed = max((at for at in (landed, landed_here) if at), default=None)
        last = version
    if last > after:
        yield feedback.snapshot(last), added, landed


def _landed(con: duckdb.DuckDBPyConnection, files: list[str]) -> datetime | None:
    if not files:
        return None
    view_of(con, "landed_now", LogSnapshot(0, files, None, LOG_SCHEMA))
    row = con.execute("select max(landed_at) from landed_now").fetchone()
    return row[0] if row else None


def _changed(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    added: list[str] | None,
    settings: FeatureSettings,
    position: Position,
) -> Touched:
    if added is None:
        return everything(con, snapshot)
    return touched(con, snapshot, added, settings, position.watermark)


def _write(folder: Path, name: str, values: pa.Table, known_at: datetime) -> None:
    """One file, there whole or not at all."""
    if not values.num_rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    when = pa.array([known_at] * values.num_rows, pa.timestamp("us", "UTC"))
    values = values.append_column(KNOWN_AT, when).append_column(CREATED_AT, when)
    temporary = folder / f".{name}.tmp"
    pq.write_table(values, temporary)
    temporary.replace(folder / f"{name}.parquet")


def _clear(exports: Path) -> None:
    """Another log: its past is not this one's."""
    for folder in (exports / USER_EXPORT, exports / ITEM_EXPORT):
        for file in folder.glob("*.parquet"):
            file.unlink()
