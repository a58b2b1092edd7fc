"""From Kafka records to one Arrow table of the log: decode, bucket, check the signature, build the columns.

The hot path of an ingest worker: one small Python object an event, columns built once a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import msgspec
import pyarrow as pa

from .interactions import (
    EARLIEST,
    LATEST_AHEAD,
    MAX_EVENT_BYTES,
    Interaction,
    InvalidInteraction,
    decode_until,
)
from .levels import LevelRules, level_of
from .log import LOG_SCHEMA
from .requests import verify_request
from .settings import FeatureSettings


class Record(NamedTuple):
    """One Kafka record, as far as the log needs it."""

    raw: bytes | None
    partition: int
    offset: int
    arrived_ms: int
    """Kafka's record timestamp, epoch milliseconds."""


@dataclass(frozen=True)
class Refused:
    """A record that cannot be accepted, with the decoder's reason code and words."""

    record: Record
    reason: str
    message: str


class InteractionBatch:
    """Accepted events of one batch, in order of arrival.

    Invariant: row n of ``table`` is the n-th accepted record that was not discarded. Refused records are
    handed back by ``add`` and still count for ``last_offsets``: a poison message never stops a partition.
    """

    def __init__(
        self,
        rules: LevelRules,
        *,
        signing_key: bytes | None = None,
        max_bytes: int = MAX_EVENT_BYTES,
        earliest: datetime = EARLIEST,
    ) -> None:
        self._rules = rules
        self._key = signing_key
        self._max_bytes = max_bytes
        self._earliest = earliest
        self.clear()

    @classmethod
    def of(cls, settings: FeatureSettings) -> "InteractionBatch":
        """An empty batch by the settings."""
        return cls(
            settings.levels,
            signing_key=settings.request_key_bytes,
            max_bytes=settings.max_event_bytes,
            earliest=settings.earliest_event,
        )

    def __len__(self) -> int:
        return len(self._events)

    def clear(self) -> None:
        """Forget everything: after a commit, or when the batch must be dropped."""
        self._events: list[Interaction] = []
        self._records: list[Record] = []
        self._last: dict[int, Record] = {}

    def add(self, records: Iterable[Record], *, now: datetime) -> list[Refused]:
        """Take ``records``, each partition's in the order of its offsets; returns those that were refused."""
        latest, max_bytes, earliest = now + LATEST_AHEAD, self._max_bytes, self._earliest
        keep_event, keep_record, last = self._events.append, self._records.append, self._last
        refused: list[Refused] = []
        for record in records:
            raw = record[0]
            try:
                if raw is None:
                    raise InvalidInteraction("bad_json", "the record has no value")
                keep_event(decode_until(raw, latest, max_bytes, earliest))
                keep_record(record)
            except InvalidInteraction as error:
                refused.append(Refused(record, error.reason, str(error)))
            last[record[1]] = record
        return refused

    def discard(self, partition: int) -> int:
        """Forget a revoked partition; returns how many accepted rows went with it."""
        before = len(self._events)
        kept = [n for n, record in enumerate(self._records) if record.partition != partition]
        self._events = [self._events[n] for n in kept]
        self._records = [self._records[n] for n in kept]
        self._last.pop(partition, None)
        return before - len(kept)

    def last_offsets(self) -> dict[int, int]:
        """Last offset taken of each partition, refused records included."""
        return {partition: record.offset for partition, record in self._last.items()}

    def last_arrivals(self) -> dict[int, int]:
        """Arrival of the last record taken of each partition, epoch milliseconds."""
        return {partition: record.arrived_ms for partition, record in self._last.items()}

    def table(self, landed_at: datetime) -> pa.Table:
        """The accepted events as LOG_SCHEMA; ``landed_at`` is the worker's clock at the commit."""
        events, records, rules = self._events, self._records, self._rules
        n = len(events)
        key = self._key
        columns = {
            "event_id": [event.event_id for event in events],
            "user_id": [event.user_id for event in events],
            "item_id": [event.item_id for event in events],
            "kind": [event.kind for event in events],
            "occurred_at": [event.occurred_at for event in events],
            "level": [level_of(event, rules) for event in events],
            "rules": _constant(rules.hash, n, pa.string()),
            "request_id": [event.request_id for event in events],
            "position": [event.position for event in events],
            "policy_version": [event.policy_version for event in events],
            "propensity": [event.propensity for event in events],
            "value": [event.value for event in events],
            "text": [event.text for event in events],
            "source": [event.source for event in events],
            "schema_version": [event.schema_version for event in events],
            "extra": [_encode(event.extra) if event.extra else None for event in events],
            "signed": pa.nulls(n, pa.bool_()) if key is None else _signed(key, events),
            "arrived_at": pa.array([record[3] for record in records], pa.int64()).cast(
                pa.timestamp("ms", "UTC")
            ),
            "landed_at": _constant(landed_at, n, pa.timestamp("us", "UTC")),
            "landed_on": _constant(landed_at.date(), n, pa.date32()),
            "kafka_partition": [record[1] for record in records],
            "kafka_offset": [record[2] for record in records],
        }
        return pa.table([_column(columns[field.name], field.type) for field in LOG_SCHEMA], schema=LOG_SCHEMA)


_encode = msgspec.json.Encoder().encode


def _column(values: pa.Array | list[object], kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, kind)


def _constant(value: object, n: int, kind: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), n)


def _signed(key: bytes, events: list[Interaction]) -> list[bool | None]:
    """Null without a request; a slate's events share one check."""
    known: dict[tuple[str, str], bool] = {}
    signed: list[bool | None] = []
    for event in events:
        request = event.request_id
        if request is None:
            signed.append(None)
            continue
        pair = (request, event.user_id)
        verdict = known.get(pair)
        if verdict is None:
            verdict = known[pair] = verify_request(key, request, event.user_id)
        signed.append(verdict)
    return signed
