"""Landing: rows and the Kafka offsets they end at become one Delta commit, exactly once.

The four steps: (1) ``claim`` reads each owned partition's
last landed offset from the log: the log is the truth, Kafka's committed offset only advice; (2) ``land``
appends with the very handle that was read, one app transaction a partition; (3) before that the handle's
versions must still be what this worker last read or wrote (FeedbackLog.append refuses otherwise): an append
moves the handle past other workers' commits too; (4) on any failure the caller drops its rows, claims again
and seeks. A Landing belongs to one thread.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
from deltalake.exceptions import DeltaError

from features.batch import InteractionBatch, Refused
from features.log import (
    LOG_SCHEMA,
    FeedbackLog,
    LogConflict,
    LogUnwritable,
    offsets_app,
    partitions_app,
    watermark_app,
)
from features.settings import FeatureSettings
from features.tombstones import TombstoneWatch

from .dead_letters import DeadLetterBox
from .topics import TopicIdentity

_EMPTY = LOG_SCHEMA.empty_table()


@dataclass(frozen=True)
class Landed:
    """What one commit put into the log."""

    rows: int
    refused: int
    next_offsets: dict[int, int]
    """Partition -> offset of the next event to land."""
    version: int
    forgotten: int = 0
    """Rows and refused records left out because their user was forgotten."""


class Landing:
    """Writes batches of one topic into the log at ``path``. Not shared between threads."""

    def __init__(
        self,
        path: str | Path,
        settings: FeatureSettings,
        dead_letters: DeadLetterBox,
        clock: Callable[[], datetime],
    ) -> None:
        self._path = path
        self._settings = settings
        self._dead_letters = dead_letters
        self._clock = clock
        self._log: FeedbackLog | None = None
        self._identity: TopicIdentity | None = None
        self._owned: frozenset[int] = frozenset()
        self._watermarks: dict[int, int] = {}
        self._tombstones = TombstoneWatch(path)

    def claim(self, identity: TopicIdentity, partitions: Iterable[int]) -> dict[int, int | None]:
        """Open the log afresh; last landed offset of each partition, None where nothing has landed yet."""
        self._log = None
        try:
            log = FeedbackLog.open(self._path, checkpoint_interval=self._settings.checkpoint_interval)
        except (DeltaError, OSError) as error:
            cause = " ".join(str(error).split())[:300]
            raise LogUnwritable(
                f"the feedback log at {self._path} cannot be opened ({cause}); check the disk, start again"
            ) from error
        self._log, self._identity = log, identity
        self._owned = frozenset(partitions)
        self._watermarks = {}
        last: dict[int, int | None] = {}
        for partition in self._owned:
            mark = log.transaction_version(watermark_app(identity.life, identity.topic, partition))
            if mark is not None:
                self._watermarks[partition] = mark
            last[partition] = log.transaction_version(offsets_app(identity.life, identity.topic, partition))
        return last

    def land(self, batch: InteractionBatch, refused: list[Refused]) -> Landed:
        """Append ``batch``; its last offsets move with it. Refused records reach the dead letters first.
        What is of a user who was forgotten goes nowhere.

        Raises LogConflict, LogUnwritable, DeadLettersRefused; after any of them nothing more is taken until
        ``claim``: a later batch must never move the offset past one that did not land.
        """
        log, identity = self._claimed()
        self._log = None
        now = self._clock()
        rows = batch.table(now) if len(batch) else _EMPTY
        taken = rows.num_rows + len(refused)
        buried = self._tombstones.current()
        if buried is not None:
            rows = buried.without(rows)
            refused = [one for one in refused if not buried.names(one.record.raw)]
        if refused:
            self._dead_letters.publish(refused, identity)
        last, arrivals = batch.last_offsets(), batch.last_arrivals()
        latest = int(now.timestamp() * 1000)  # a producer's clock must not carry the watermark ahead of ours
        marks = {p: max(self._watermarks.get(p, 0), min(arrivals[p], latest)) for p in last}
        version = self._append(log, identity, rows, last, marks)
        self._log = log
        return Landed(
            rows=rows.num_rows,
            refused=len(refused),
            next_offsets={p: offset + 1 for p, offset in last.items()},
            version=version,
            forgotten=taken - rows.num_rows - len(refused),
        )

    def advance(self, partitions: Iterable[int], at_ms: int) -> int:
        """Move the watermark of idle, caught-up ``partitions`` to ``at_ms`` (epoch ms) without any row.

        Raises LogConflict, LogUnwritable; then claim again.
        """
        log, identity = self._claimed()
        marks = {p: at_ms for p in partitions if at_ms > self._watermarks.get(p, 0)}
        self._log = None
        version = self._append(log, identity, _EMPTY, {}, marks) if marks else log.version
        self._log = log
        return version

    def _append(
        self,
        log: FeedbackLog,
        identity: TopicIdentity,
        rows: pa.Table,
        last: Mapping[int, int],
        marks: Mapping[int, int],
    ) -> int:
        moves = {offsets_app(identity.life, identity.topic, p): offset for p, offset in last.items()}
        moves |= {watermark_app(identity.life, identity.topic, p): mark for p, mark in marks.items()}
        # The owner of the first partition tells the log how many there are: the watermark waits for all.
        counted = partitions_app(identity.life, identity.topic)
        number = len(identity.partitions)
        if identity.partitions[0] in self._owned and (log.transaction_version(counted) or 0) < number:
            moves[counted] = number
        version = log.append(rows, moves)
        self._watermarks.update(marks)
        return version

    def _claimed(self) -> tuple[FeedbackLog, TopicIdentity]:
        if self._log is None or self._identity is None:
            raise LogConflict(
                "no partition is claimed, or the batch before this one did not land; claim again"
            )
        return self._log, self._identity
