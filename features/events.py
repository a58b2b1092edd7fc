"""A snapshot's events as queries read them: each once, with numbers for ids, on both clocks, shard by shard.

A shard is a range of users (in the order of their ids) with about so many events; all that is learned from a
log is per user, so shards are independent, run one after another in bounded memory, and the answers of all of
them in a row are sorted by user. Every function here works on temporary tables of the connection it is given;
what each table holds is told in the query that makes it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from .duck import view_of
from .interactions import Kind
from .levels import EXPLICIT_KINDS, IMPLICIT_KINDS
from .log import LogSnapshot
from .queries import execute
from .settings import FeatureSettings
from .split import Role, role_of

ENGAGING_KINDS = frozenset({Kind.CLICK, Kind.RATING, Kind.REVIEW, Kind.PURCHASE})
"""The user took the item up: it belongs into a history unless the event says disliked. So does all liked."""
ANSWERING_KINDS = EXPLICIT_KINDS | IMPLICIT_KINDS - {Kind.IMPRESSION}
"""The user did something with the item: an impression with one of these in its window was not passed over."""

_KINDS = pa.table(
    {
        "kind": [kind.value for kind in Kind],
        "explicit": [kind in EXPLICIT_KINDS for kind in Kind],
        "answers": [kind in ANSWERING_KINDS for kind in Kind],
        "engages": [kind in ENGAGING_KINDS for kind in Kind],
    }
)

NUMBERING = ["events_users", "events_items", "events_requests", "events_keyed"]
MARKING = ["events_marked", "events_capped", "events_unmarked"]
READING = ["events_landed", "events_duplicates", "events"]
JUDGING = ["impressions_unanswered", "levels_in_force"]


@dataclass(frozen=True)
class Numbered:
    """What was counted while a snapshot's ids were numbered."""

    rows: int
    """Rows of the snapshot (of the users asked for)."""
    unsigned: int
    """Of these left out: their request id was not signed by us."""
    marked: Mapping[str, int]
    """Of these left out for another mark (see events_marked.sql, events_capped.sql), by mark."""
    users: int
    item_ids: pa.Array
    """Item id of every item number, in order."""

    def named(self, table: pa.Table, columns: Iterable[str]) -> pa.Table:
        """``table`` with item ids for the item numbers in these of its columns, all of lists."""
        for name in columns:
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, self._items(table.column(name)))
        return table

    def _items(self, numbers: pa.ChunkedArray) -> pa.Array:
        """Lists of item numbers as lists of item ids."""
        lists = numbers.combine_chunks()
        if isinstance(lists, pa.ChunkedArray):  # an empty column has no chunk to combine
            lists = pa.concat_arrays(lists.chunks) if lists.num_chunks else pa.array([], numbers.type)
        return named_lists(lists, self.item_ids)


def named_lists(lists: pa.ListArray, names: pa.Array) -> pa.ListArray:
    """Lists of places in ``names`` as lists of the names themselves; no list may be null."""
    lengths = np.asarray(lists.value_lengths(), dtype=np.int64)
    offsets = np.zeros(len(lists) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), names.take(lists.flatten()))


def number(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    user_ids: Sequence[str] | None = None,
) -> Numbered:
    """Give users, items and requests of ``snapshot`` numbers (only those of ``user_ids``, when given)."""
    look_at(con, snapshot, user_ids)
    con.register("kinds_arrow", _KINDS)
    con.execute("create or replace temp table kinds as select * from kinds_arrow")
    con.unregister("kinds_arrow")
    for name in NUMBERING:
        execute(con, name, {"unsigned": settings.dataset.learn_from_unsigned})
    rows, users = _row(con, "select coalesce(sum(events), 0)::bigint, count(*) from users")
    (kept,) = _row(con, "select count(*) from keyed")
    marked = _leave_out_marked(con, settings, everyone=user_ids is None)
    item_ids = con.sql("select item_id from items order by i").to_arrow_table().column("item_id")
    return Numbered(
        rows=rows,
        unsigned=rows - kept,
        marked=marked,
        users=users,
        item_ids=item_ids.combine_chunks() if item_ids.num_chunks != 1 else item_ids.chunk(0),
    )


def _leave_out_marked(
    con: duckdb.DuckDBPyConnection, settings: FeatureSettings, *, everyone: bool
) -> dict[str, int]:
    """Mark what cannot be, then what is too much of the rest; ``keyed`` goes on without them.

    The table ``marks`` names every such row by user number and place in the log. ``everyone``: every user's
    rows are read, so what was served to others need not be looked for in the rest of the log.
    """
    trust = settings.trust
    age = trust.max_feedback_age_s
    values = {
        "everyone": everyone,
        "unsigned": settings.dataset.learn_from_unsigned,
        "cross_user": trust.cross_user,
        "age_us": None if age is None else round(age * 1e6),
        "positions": trust.positions,
        "off_slate": trust.off_slate,
        "organic_until": trust.organic_until,
        "user_day": trust.max_events_per_user_day,
        "request": trust.max_events_per_request,
    }
    con.execute(
        "create or replace temp table marks"
        " (u integer, landed_at timestamptz, kafka_partition integer, kafka_offset bigint, mark varchar)"
    )
    for name, on in (("events_marked", trust.marks), ("events_capped", trust.caps)):
        if not on:
            continue
        execute(con, name, values)
        con.execute("insert into marks select * from doubted")
        (found,) = _row(con, "select count(*) from doubted")
        if found:
            execute(con, "events_unmarked", {})
        con.execute("drop table doubted")
    counted = con.execute("select mark, count(*) from marks group by mark order by mark").fetchall()
    return {str(mark): int(count) for mark, count in counted}


def look_at(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, user_ids: Sequence[str] | None = None
) -> None:
    """Make the view ``logged``: the snapshot's rows (only those of ``user_ids``, when given)."""
    view_of(con, "whole_log", snapshot)
    if user_ids is None:
        con.execute("create or replace temp view logged as select * from whole_log")
        return
    wanted = pa.table({"user_id": pa.array(sorted(set(user_ids)), pa.string())})
    con.register("wanted_arrow", wanted)
    con.execute("create or replace temp table wanted as select user_id from wanted_arrow")
    con.unregister("wanted_arrow")
    con.execute(
        "create or replace temp view logged as select * from whole_log semi join wanted using (user_id)"
    )


def users_of(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, role: Role, gate_share: float, stop_share: float
) -> list[str]:
    """Users with events at ``snapshot`` whose role it is."""
    look_at(con, snapshot)
    every = con.execute("select distinct user_id from logged").fetchall()
    return [user_id for (user_id,) in every if role_of(user_id, gate_share, stop_share) == role]


def shards(con: duckdb.DuckDBPyConnection, rows_per_shard: int) -> list[range]:
    """Ranges of user numbers with about ``rows_per_shard`` events each; a user is never split."""
    cuts = con.execute(
        "select min(u), max(u) + 1 from (select u, (sum(events) over (order by u) - events) // ? as shard"
        " from users) group by shard order by shard",
        [rows_per_shard],
    ).fetchall()
    return [range(first, end) for first, end in cuts]


def each_shard(
    con: duckdb.DuckDBPyConnection, settings: FeatureSettings, watermark: datetime | None
) -> Iterator[tuple[range, int]]:
    """Make the tables ``events`` and ``in_force`` for one shard after another.

    Yields the shard's range of user numbers and how many repeated events were dropped from it.
    """
    values = parameters(settings, watermark)
    for shard in shards(con, settings.dataset.rows_per_shard):
        for name in READING + JUDGING:
            execute(con, name, {**values, "first": shard.start, "last": shard.stop - 1})
        (dropped,) = _row(con, "select coalesce(sum(dropped), 0)::bigint from duplicates")
        yield shard, dropped


def parameters(settings: FeatureSettings, watermark: datetime | None) -> dict[str, Any]:
    """The settings as the queries name them. A window never closes without a watermark."""
    return {
        "watermark": watermark,
        "window_us": round(settings.attribution_window_s * 1e6),
        "history_length": settings.history_length,
        "look_back": settings.history_look_back,
        "max_rejected": settings.max_rejected,
    }


def _row(con: duckdb.DuckDBPyConnection, text: str) -> tuple[Any, ...]:
    (row,) = con.execute(text).fetchall()  # to the end: an open result would hold the connection
    return tuple(row)
