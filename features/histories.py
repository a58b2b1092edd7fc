"""What users engaged with: the sequences that a policy is taught on and prompted with.

Engaged is an event that is liked, or a click, rating, review or purchase that is not disliked. A history
holds every item once, at its latest occurrence, oldest first.
"""

from collections.abc import Sequence
from datetime import datetime

import duckdb
import pyarrow as pa

from .events import each_shard, look_at, number
from .log import LogSnapshot
from .queries import fetch
from .settings import FeatureSettings

HISTORY_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("item_ids", pa.list_(pa.string())),
        pa.field("times", pa.list_(pa.timestamp("us", "UTC"))),
        pa.field("levels", pa.list_(pa.int8())),
    ]
)
"""``item_ids`` oldest first; ``times``: of each item's latest engaged event; ``levels``: in force at the
snapshot, null where an item has none (a click says nothing by itself)."""

SEEN_SCHEMA = pa.schema([pa.field("user_id", pa.string()), pa.field("item_ids", pa.list_(pa.string()))])


def histories(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    *,
    before: datetime | None = None,
    user_ids: Sequence[str] | None = None,
) -> pa.Table:
    """Every user's whole history at ``snapshot``, by user.

    Only what occurred strictly ``before``, when given. Columns as in HISTORY_SCHEMA; users who
    engaged with nothing have no row.
    """
    return _histories(con, snapshot, settings, before, user_ids, look_back=None, length=None)


def recent_histories(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    *,
    before: datetime | None = None,
    user_ids: Sequence[str] | None = None,
) -> pa.Table:
    """What a prompt at ``snapshot`` holds: the last ``history_length`` items of each user.

    They are found among the last ``history_look_back`` engaged events, as in the prompts of preference
    samples, so that a policy is asked as it was taught. Columns as in HISTORY_SCHEMA.
    """
    return _histories(
        con,
        snapshot,
        settings,
        before,
        user_ids,
        look_back=settings.history_look_back,
        length=settings.history_length,
    )


def seen(
    con: duckdb.DuckDBPyConnection, snapshot: LogSnapshot, user_ids: Sequence[str] | None = None
) -> pa.Table:
    """Items that each user has met: any event but ``served``, signed or not. Columns as in SEEN_SCHEMA."""
    look_at(con, snapshot, user_ids)
    return fetch(con, "seen", {}).cast(SEEN_SCHEMA)


def items_of_users(table: pa.Table) -> dict[str, list[str]]:
    """User id -> item ids, of histories or of what was seen."""
    return dict(zip(table["user_id"].to_pylist(), table["item_ids"].to_pylist(), strict=True))


def _histories(
    con: duckdb.DuckDBPyConnection,
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    before: datetime | None,
    user_ids: Sequence[str] | None,
    *,
    look_back: int | None,
    length: int | None,
) -> pa.Table:
    numbered = number(con, snapshot, settings, user_ids)
    values = {"before": before, "look_back": look_back, "length": length}
    parts = []
    for _ in each_shard(con, settings, snapshot.watermark):
        part = numbered.named(fetch(con, "histories", values), ("item_ids",))
        parts.append(part.cast(HISTORY_SCHEMA))
    return pa.concat_tables(parts) if parts else HISTORY_SCHEMA.empty_table()
