"""Replaying a published dataset as a stream: filtered, split, sent at its own pace or at full speed."""

import gzip
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from features.interactions import Interaction, encode_interaction

from .importers import interactions

_REPORT_EVERY = 1000


class Sender(Protocol):
    """What a replay needs of a producer; ``ingest.producer.FeedbackProducer`` is one."""

    def send(self, interaction: Interaction) -> None:
        """Queue one event."""


@dataclass(frozen=True)
class Split:
    """Events to replay, and each user's last ones kept back."""

    replayed: pa.Table
    held_out: pa.Table


def k_core(events: pa.Table, k: int) -> pa.Table:
    """``events`` without users and items of fewer than ``k`` events, repeated until none is left to drop."""
    if k <= 1 or not events.num_rows:
        return events
    users = _codes(events["user_id"])
    items = _codes(events["item_id"])
    kept = np.arange(events.num_rows)
    while True:
        user_counts, item_counts = np.bincount(users[kept]), np.bincount(items[kept])
        enough = (user_counts[users[kept]] >= k) & (item_counts[items[kept]] >= k)
        if enough.all():
            return events.take(pa.array(kept))
        kept = kept[enough]
        if not kept.size:
            return events.slice(0, 0)


def leave_out(events: pa.Table, n: int) -> Split:
    """The last ``n`` events of every user who has more than ``n``, kept back (n = 1: leave-one-out).

    ``events`` must be in time order; both parts stay so.
    """
    if n <= 0 or not events.num_rows:
        return Split(events, events.slice(0, 0))
    users = _codes(events["user_id"])
    totals = np.bincount(users)
    order = np.argsort(users, kind="stable")
    starts = np.concatenate(([0], np.cumsum(totals)[:-1]))
    place = np.empty(len(users), dtype=np.int64)
    place[order] = np.arange(len(users)) - np.repeat(starts, totals)
    total = totals[users]
    held = (total > n) & (place >= total - n)
    return Split(events.filter(pa.array(~held)), events.filter(pa.array(held)))


def write_held_out(file: Path, events: pa.Table, source: str) -> int:
    """Write ``events`` as JSON lines of interactions (packed when named ``.gz``); returns their number."""
    count = 0
    with gzip.open(file, "wb") if file.suffix == ".gz" else file.open("wb") as out:
        for event in interactions(events, source):
            out.write(encode_interaction(event) + b"\n")
            count += 1
    return count


def replay(
    stream: Iterable[Interaction],
    sender: Sender,
    *,
    speed: float | None = None,
    progress: Callable[[int], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Send ``stream``, which is in time order; returns how many events were sent.

    ``speed``: seconds of the events' own time for each second of ours; None sends as fast as it goes.
    ``progress`` is told the number sent so far, now and then and at the end.
    """
    sent = 0
    first = started = 0.0
    for event in stream:
        if speed is not None:
            at = event.occurred_at.timestamp()
            if not sent:
                first, started = at, clock()
            due = started + (at - first) / speed
            wait = due - clock()
            if wait > 0:
                progress(sent)
                sleep(wait)
        sender.send(event)
        sent += 1
        if sent % _REPORT_EVERY == 0:
            progress(sent)
    progress(sent)
    return sent


def _codes(column: pa.ChunkedArray) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Column -> small integers, equal for equal values."""
    encoded = column.combine_chunks().dictionary_encode()
    return np.asarray(encoded.indices.to_numpy(zero_copy_only=False), dtype=np.int64)
