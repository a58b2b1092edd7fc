"""What is pushed: whole values of the users and items that changed, out of one snapshot of the log.

History, level in force and seen are the store's own queries (``features.histories``, ``features.in_force``),
never a second definition.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa

from ..duck import view_of
from ..histories import recent_histories, seen
from ..in_force import levels_in_force
from ..log import LOG_SCHEMA, LogSnapshot
from ..settings import FeatureSettings

_HERE = Path(__file__).parent
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Touched:
    """What may have changed between two versions of the log."""

    users: list[str]
    items: list[str] | None
    """None: every item."""
    landed_at: datetime | None
    """When the newest of the new rows landed."""


def touched(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    added: Sequence[str],
    settings: FeatureSettings,
    watermark_before: datetime | None,
) -> Touched:
    """Users and items with rows in the files ``added``, and users whose impressions' windows have closed."""
    view_of(con, "whole_log", snapshot)
    view_of(
        con,
        "new_rows",
        LogSnapshot(snapshot.version, list(added), None, LOG_SCHEMA, snapshot.storage_options),
    )
    users = con.execute(
        _query("touched"),
        {
            "watermark": snapshot.watermark,
            "watermark_before": watermark_before or _NEVER,
            "window_us": round(settings.attribution_window_s * 1e6),
        },
    ).fetchall()
    items = con.execute("select distinct item_id from new_rows where kind <> 'served' order by 1").fetchall()
    newest = con.execute("select max(landed_at) from new_rows").fetchone()
    return Touched([user for (user,) in users], [item for (item,) in items], newest[0] if newest else None)


def everything(con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot) -> Touched:
    """Every user and item of ``snapshot``."""
    view_of(con, "whole_log", snapshot)
    users = con.execute("select distinct user_id from whole_log order by 1").fetchall()
    newest = con.execute("select max(landed_at) from whole_log").fetchone()
    return Touched([user for (user,) in users], None, newest[0] if newest else None)


def user_values(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, settings: FeatureSettings, user_ids: Sequence[str]
) -> pa.Table:
    """One row a user, by user: ``user_id`` and the features of ``definitions.USER_VIEWS``.

    The log is read once: the users' rows become a small snapshot of their own, and the queries run on that.
    """
    with TemporaryDirectory(prefix="align3gr-follow-") as scratch:
        theirs = _rows_of(con, snapshot, user_ids, Path(scratch))
        tables = {
            "histories_now": recent_histories(con, theirs, settings),
            "levels_now": levels_in_force(con, theirs, settings),
            "seen_now": seen(con, theirs),
        }
        for name, table in tables.items():
            con.register(name, table)
        try:
            return con.sql(_query("online_users")).to_arrow_table()
        finally:
            for name in tables:
                con.unregister(name)


def each_user_values(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, settings: FeatureSettings, user_ids: Sequence[str]
) -> Iterator[pa.Table]:
    """``user_values`` of as many users at a time as the settings allow."""
    size = settings.online.query_users
    for start in range(0, len(user_ids), size):
        yield user_values(con, snapshot, settings, user_ids[start : start + size])


def item_values(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, item_ids: Sequence[str] | None
) -> pa.Table:
    """One row an item (None: all), by item: ``item_id`` and the features of ``definitions.ITEM_VIEWS``."""
    view_of(con, "whole_log", snapshot)
    con.register("touched_items", pa.table({"item_id": pa.array(item_ids or [], pa.string())}))
    try:
        return con.sql(_query("online_items"), params={"everything": item_ids is None}).to_arrow_table()
    finally:
        con.unregister("touched_items")


def _rows_of(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, user_ids: Sequence[str], scratch: Path
) -> LogSnapshot:
    """A snapshot of the same version with nothing but the rows of ``user_ids``, without their long texts.

    It lies in a folder named like the log's partitions, because that is how snapshots are read.
    """
    file = scratch / "landed_on=1970-01-01" / "rows.parquet"
    file.parent.mkdir()
    view_of(con, "whole_log", snapshot)
    con.register("pushed_users", pa.table({"user_id": pa.array(user_ids, pa.string())}))
    try:
        con.sql(_query("rows_of_users")).write_parquet(str(file))
    finally:
        con.unregister("pushed_users")
    return replace(snapshot, files=[str(file)], storage_options=None)


def _query(name: str) -> str:
    return (_HERE / f"{name}.sql").read_text(encoding="utf-8")
