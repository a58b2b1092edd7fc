"""Feedback logs for tests: rows as an ingest worker would land them, and their truth in plain Python."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa

from features.interactions import Kind
from features.log import LOG_SCHEMA, FeedbackLog, offsets_app, watermark_app
from tests.features.online.factory import EPOCH

LEVELS: dict[Kind, int | None] = {
    Kind.SERVED: None,
    Kind.CLICK: None,
    Kind.IMPRESSION: 0,
    Kind.LIKE: 1,
    Kind.DISLIKE: -1,
    Kind.PURCHASE: 1,
}
ENGAGING = {Kind.CLICK, Kind.PURCHASE, Kind.LIKE}
LEVEL_NAMES = {1: "liked", 0: "neutral", -1: "disliked", None: "none"}


@dataclass
class Landing:
    """Appends to one partition of a log, remembering every row."""

    log: FeedbackLog
    offset: int = 0
    rows: list[dict[str, Any]] | None = None

    def land(
        self,
        events: Sequence[tuple[str, str, Kind, datetime]],
        at: datetime,
        *,
        watermark: datetime | None = None,
    ) -> None:
        """One commit: (user, item, kind, occurred_at), all landing at ``at``."""
        rows = []
        for user, item, kind, occurred_at in events:
            rows.append(
                {
                    "event_id": f"e{self.offset}", "user_id": user, "item_id": item, "kind": str(kind),
                    "occurred_at": occurred_at, "level": LEVELS[kind], "rules": "r", "schema_version": "1.0",
                    "arrived_at": at, "landed_at": at, "landed_on": at.date(),
                    "kafka_partition": 0, "kafka_offset": self.offset,
                }
            )  # fmt: skip
            self.offset += 1
        self.rows = [*(self.rows or []), *rows]
        app = offsets_app("c", "t", 0)
        self.log.refresh()
        self.log.transaction_version(app)
        moves = {app: self.offset - 1} if rows else {}
        moves[watermark_app("c", "t", 0)] = int((watermark or at).timestamp() * 1000)
        self.log.append(pa.Table.from_pylist(rows, schema=LOG_SCHEMA), moves)


def history_of(
    rows: Sequence[dict[str, Any]], user: str, *, landed_before: datetime | None = None
) -> list[str]:
    """The last 20 distinct engaged items among the last 40 engaged events, oldest first."""
    engaged = [
        row
        for row in rows
        if row["user_id"] == user
        and Kind(row["kind"]) in ENGAGING
        and (landed_before is None or row["landed_at"] < landed_before)
    ]
    engaged.sort(key=lambda row: (row["occurred_at"], row["landed_at"], row["kafka_offset"]))
    latest: dict[str, None] = {}
    for row in engaged[-40:]:
        latest.pop(row["item_id"], None)
        latest[row["item_id"]] = None
    return list(latest)[-20:]


def seen_by(rows: Sequence[dict[str, Any]], user: str, *, landed_before: datetime | None = None) -> set[str]:
    """Items with any event but ``served``."""
    return {
        row["item_id"]
        for row in rows
        if row["user_id"] == user
        and row["kind"] != "served"
        and (landed_before is None or row["landed_at"] < landed_before)
    }


def random_events(
    chance: random.Random, count: int, users: int, at: datetime
) -> list[tuple[str, str, Kind, datetime]]:
    """Events of the hour before ``at``, some of them late by up to a day."""
    kinds = list(LEVELS)
    events = []
    for _ in range(count):
        late = timedelta(hours=chance.uniform(1, 24)) if chance.random() < 0.2 else timedelta()
        occurred = at - late - timedelta(seconds=chance.uniform(0, 3600))
        events.append(
            (f"u{chance.randrange(users)}", f"i{chance.randrange(60)}", chance.choice(kinds), occurred)
        )
    return events


def start() -> datetime:
    """When these worlds begin."""
    return EPOCH + timedelta(days=2)
