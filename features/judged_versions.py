"""What users made of what a version showed them, by the levels in force: how two are compared online."""

from datetime import datetime

import pyarrow as pa

from .duck import connect
from .events import each_shard, look_at, number, parameters
from .log import LogSnapshot
from .queries import fetch
from .settings import FeatureSettings

JUDGED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("version", pa.string()),
        pa.field("liked", pa.float64()),
        pa.field("known_at", pa.timestamp("us", "UTC")),
    ]
)
"""One row a user and version: ``liked``, the share liked of the first items that it showed the user and that
have a level in force; ``known_at``, when the last of these was shown."""


def judged_versions(
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    versions: tuple[str, str],
    *,
    since: datetime,
    judged: int,
) -> pa.Table:
    """Users whom one of ``versions`` showed ``judged`` items with a level since ``since``, in JUDGED_SCHEMA.

    By ``known_at`` and user: the order in which a sequential test takes them, which no outcome decides.
    """
    values = {
        **parameters(settings, snapshot.watermark),
        "first_version": versions[0],
        "second_version": versions[1],
        "since": since,
        "judged": judged,
    }
    found = [JUDGED_SCHEMA.empty_table()]
    with connect(settings) as con:
        look_at(con, snapshot)
        met = con.execute(
            "select distinct user_id from logged where kind = 'served' and occurred_at >= $since"
            " and policy_version in ($first_version, $second_version)",
            {name: values[name] for name in ("since", "first_version", "second_version")},
        ).fetchall()
        number(con, snapshot, settings, [user_id for (user_id,) in met])
        for _ in each_shard(con, settings, snapshot.watermark):
            table = fetch(con, "judged_by_version", values)
            found.append(table.select(JUDGED_SCHEMA.names).cast(JUDGED_SCHEMA))
    return pa.concat_tables(found).sort_by([("known_at", "ascending"), ("user_id", "ascending")])
