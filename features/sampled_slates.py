"""Sampled slates as off-policy evaluation needs them: every place in order, its propensity, and what came of
it.

Unlike the cases of ``features.cases``, a slate is here whole, also where nobody liked or looked at anything:
leaving those out would make every policy look good.
"""

from datetime import datetime

import pyarrow as pa

from .datasets import LIKING
from .duck import connect
from .events import each_shard, number, parameters, users_of
from .log import LogSnapshot
from .queries import execute, fetch
from .settings import FeatureSettings
from .split import Role

SAMPLED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("asked_at", pa.timestamp("us", "UTC")),
        pa.field("policy_version", pa.string()),
        pa.field("history", pa.list_(pa.string())),
        pa.field("met", pa.list_(pa.string())),
        pa.field("items", pa.list_(pa.string())),
        pa.field("propensities", pa.list_(pa.float64())),
        pa.field("liked", pa.list_(pa.bool_())),
    ]
)
"""One sampled slate a row, by user and time: items by position; ``history`` and ``met`` as of the request;
``liked``: the level in force is liked (unseen and neutral are both not)."""


def sampled_slates(
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    *,
    gate_share: float = 0.0,
    stop_share: float = 0.0,
    role: Role | None = None,
    since: datetime | None = None,
    most: int | None = None,
) -> pa.Table:
    """Sampled slates at ``snapshot`` in SAMPLED_SCHEMA, of all users or of those of one ``role``.

    ``since``: only slates that arrived later; ``most``: only the latest so many. At most
    ``dataset.max_cases_per_user`` of one user.
    """
    found = [SAMPLED_SCHEMA.empty_table()]
    values = {
        **parameters(settings, snapshot.watermark),
        "since": since,
        "cap": settings.dataset.max_cases_per_user,
    }
    with connect(settings) as con:
        users = None if role is None else users_of(con, snapshot, role, gate_share, stop_share)
        numbered = number(con, snapshot, settings, users)
        for _ in each_shard(con, settings, snapshot.watermark):
            for name in [*LIKING, "sampled_slates", "histories_at_request"]:
                execute(con, name, values)
            table = numbered.named(fetch(con, "sampled_slates_named", values), ("history", "met", "items"))
            found.append(table.select(SAMPLED_SCHEMA.names).cast(SAMPLED_SCHEMA))
    slates = pa.concat_tables(found)
    if most is not None and slates.num_rows > most:
        latest = slates.sort_by([("asked_at", "descending"), ("request_id", "ascending")]).slice(0, most)
        slates = latest.sort_by(
            [("user_id", "ascending"), ("asked_at", "ascending"), ("request_id", "ascending")]
        )
    return slates
