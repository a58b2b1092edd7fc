"""The level in force of a user and an item: what all that was said and done amounts to, at one snapshot.

Events are taken once each, in the order they first landed, without those whose request id was not ours.
Explicit beats implicit; among explicit events the latest (by ``occurred_at``; ties: landed later) wins; among
implicit ones the strongest: liked, disliked, neutral. An impression counts only when its attribution window
has closed against the snapshot's watermark (``arrived_at + window <= watermark``, never the wall clock) and
no click, dwell or explicit event of that user on that item falls into the window (by ``occurred_at``, so that
one that arrives late still answers it). ``served`` never counts: served is not seen.
"""

from collections.abc import Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from .events import each_shard, number
from .levels import Level
from .log import LogSnapshot
from .queries import fetch
from .settings import FeatureSettings

IN_FORCE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("level", pa.int8()),
        pa.field("occurred_at", pa.timestamp("us", "UTC")),
        pa.field("arrived_at", pa.timestamp("us", "UTC")),
    ]
)
"""One row a (user, item) that has a level; the times are those of the event that decided it."""


def levels_in_force(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    *,
    user_ids: Sequence[str] | None = None,
) -> pa.Table:
    """Every level in force at ``snapshot`` (of ``user_ids`` only, when given), by user and item.

    Columns as in IN_FORCE_SCHEMA. A pair of which nothing is known yet (served, a click, an impression whose
    window is open) has no row.
    """
    number(con, snapshot, settings, user_ids)
    parts = [
        fetch(con, "levels_in_force_named", {}).select(IN_FORCE_SCHEMA.names).cast(IN_FORCE_SCHEMA)
        for _ in each_shard(con, settings, snapshot.watermark)
    ]
    return pa.concat_tables(parts) if parts else IN_FORCE_SCHEMA.empty_table()


def level_counts(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, settings: FeatureSettings
) -> dict[str, int]:
    """How many (user, item) pairs are ``liked``, ``neutral`` and ``disliked`` at ``snapshot``."""
    levels = levels_in_force(con, snapshot, settings).column("level")
    counted = {row["values"]: row["counts"] for row in pc.value_counts(levels).to_pylist()}
    return {level.name.lower(): counted.get(int(level), 0) for level in sorted(Level, reverse=True)}
