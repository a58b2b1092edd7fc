"""What a policy is judged on: the gate users' slates and likes, by the same two clocks as the datasets.

Liked items of logged slates lie in the serving policy's own top k, so slates are judged by the ranking within
them; ranking the full catalogue is judged only on likes that no policy selected: organic ones, and those of
slates that were sampled.
"""

from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from .datasets import LIKING
from .duck import connect
from .events import each_shard, number, parameters, users_of
from .log import LogSnapshot
from .queries import execute, fetch
from .settings import FeatureSettings
from .split import Role

SLATE_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("asked_at", pa.timestamp("us", "UTC")),
        pa.field("policy_version", pa.string()),
        pa.field("sampled", pa.bool_()),
        pa.field("history", pa.list_(pa.string())),
        pa.field("items", pa.list_(pa.string())),
        pa.field("levels", pa.list_(pa.int8())),
    ]
)
"""One logged slate a row, by user and time: its items with their level in force (1 liked, 0 neutral,
-1 disliked; at least one liked and one other), and the history when it was asked for (none of the items)."""

RANKING_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("history", pa.list_(pa.string())),
        pa.field("target", pa.string()),
        pa.field("asked_at", pa.timestamp("us", "UTC")),
        pa.field("request_id", pa.string()),
        pa.field("sampled", pa.bool_()),
    ]
)
"""One liked item a row, by user and target, to be found in the whole catalogue given the history before it.
``sampled``: it was on a sampled slate; otherwise it is organic."""


@dataclass(frozen=True)
class EvaluationCases:
    """Both kinds of cases of the users of one role."""

    slates: pa.Table
    """Columns as in SLATE_SCHEMA."""
    ranking: pa.Table
    """Columns as in RANKING_SCHEMA."""


def evaluation_cases(
    snapshot: LogSnapshot,
    settings: FeatureSettings,
    *,
    gate_share: float,
    stop_share: float,
    role: Role = "gate",
    since: datetime | None = None,
) -> EvaluationCases:
    """Cases of all users of ``role`` at ``snapshot``.

    Only slates that were served, and likes that arrived, after ``since``; at most
    ``dataset.max_cases_per_user`` of a kind for one user, the latest. A log without any
    gives empty tables: that there are too few users is the gate's to say.
    """
    slates, ranking = [SLATE_SCHEMA.empty_table()], [RANKING_SCHEMA.empty_table()]
    values = {
        **parameters(settings, snapshot.watermark),
        "since": since,
        "cap": settings.dataset.max_cases_per_user,
    }
    with connect(settings) as con:
        users = users_of(con, snapshot, role, gate_share, stop_share)
        numbered = number(con, snapshot, settings, users)
        for _ in each_shard(con, settings, snapshot.watermark):
            for name in [*LIKING, "cases_slates", "histories_at_request"]:
                execute(con, name, values)
            found = numbered.named(fetch(con, "cases_slates_named", values), ("history", "items"))
            slates.append(found.select(SLATE_SCHEMA.names).cast(SLATE_SCHEMA))
            for name in ["cases_ranking", "histories_at_request"]:
                execute(con, name, values)
            found = numbered.named(fetch(con, "cases_ranking_named", values), ("history",))
            ranking.append(found.select(RANKING_SCHEMA.names).cast(RANKING_SCHEMA))
    return EvaluationCases(pa.concat_tables(slates), pa.concat_tables(ranking))
