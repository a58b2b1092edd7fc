"""One ingest worker: from the topic into the feedback log, exactly once, whatever dies on the way.

The loop polls and decodes on this thread while one batch at a time lands on another; a batch is handed over
when it is large or old enough. Whatever goes wrong has one answer: drop what is held, claim the partitions
again (their last landed offsets come from the log) and seek. Nothing is lost by dropping: Kafka still has it.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError, StaleMetadata
from kafka.structs import OffsetAndMetadata

from features.batch import InteractionBatch, Record, Refused
from features.log import FeedbackLog, LogConflict, LogUnwritable
from features.settings import FeatureSettings

from .assignment import Assignment
from .back_off import back_off
from .clock import utc_now
from .dead_letters import DeadLetterBox
from .errors import BrokerUnreachable, DeadLettersRefused, OffsetsLost, TopicMissing
from .garbage import collect_cycles, cyclic_collector_off
from .group import join_group, leave_group, poll_group
from .idleness import IdlePartitions
from .lag import CatchUp
from .landing import Landed, Landing
from .settings import IngestSettings, KafkaSettings
from .topics import TopicIdentity, identify, reach, replaced

logger = logging.getLogger(__name__)

_LANDINGS_FAILED = 20
"""After so many failed landings without a success between them the worker gives up and says why."""
_LOG_UNWRITABLE = 5
"""The same when the log cannot be written (a full disk): about two seconds."""


@dataclass
class WorkerReport:
    """What one worker did since it started."""

    rows: int = 0
    refused: int = 0
    commits: int = 0
    claims: int = 0
    """Times that positions were read from the log: once for each rebalance and each failure."""
    conflicts: int = 0
    """Appends that the log refused because another worker had the partition by then."""
    dropped_rows: int = 0
    """Rows decoded and dropped because a partition moved or a landing failed; somebody lands them later."""
    forgotten: int = 0
    """Events dropped because their user was forgotten (align3gr forget)."""
    refused_by_reason: Counter[str] = field(default_factory=Counter)
    first_taken_at: datetime | None = None
    """The worker's clock when it took its first record."""
    last_landed_at: datetime | None = None
    """The worker's clock after its last commit."""

    def facts(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**vars(self), "refused_by_reason": dict(self.refused_by_reason)}


class IngestWorker:
    """Lands the interactions topic in the log at ``log_path`` as one member of the consumer group.

    ``run`` returns after ``stop`` (safe from a signal handler) with everything it had decoded landed. Raises
    BrokerUnreachable and TopicMissing at the start; OffsetsLost, LogUnwritable and IngestError when going on
    would lose events or cannot work.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        ingest: IngestSettings,
        features: FeatureSettings,
        log_path: str | Path,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._kafka = kafka
        self._settings = ingest
        self._features = features
        self._log_path = log_path
        self._clock = clock
        self._stopping = False
        self._dead_letters = DeadLetterBox(kafka)
        self._landing = Landing(log_path, features, self._dead_letters, clock)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="landing")
        self._idle = IdlePartitions(kafka.topic, ingest.watermark_interval_s)
        self.report = WorkerReport()

        self._consumer: KafkaConsumer
        self._assignment: Assignment
        self._identity: TopicIdentity
        self._generation = -1
        """Generation of the assignment that ``_next`` belongs to; another one means: claim."""
        self._next: dict[int, int] = {}
        """Partition -> offset of the next record to decode; everything before it has landed or is held."""
        self._batch = InteractionBatch.of(features)
        self._refused: list[Refused] = []
        self._batch_since: float | None = None
        self._in_flight: Future[Landed] | None = None
        self._in_flight_rows = 0
        self._failures = 0
        self._target: CatchUp | None = None

    def stop(self) -> None:
        """Ask ``run`` to land what it holds and return."""
        self._stopping = True  # no Event: setting one in a signal handler may deadlock with its waiter

    def run(self, *, until_caught_up: bool = False) -> WorkerReport:
        """Work until ``stop``, or until what the topic held at the start has landed (by any worker)."""
        InteractionBatch.of(self._features).table(self._clock())  # pyarrow looks for pandas once: 0.3 s
        self._identity = identify(self._kafka)
        identify(self._kafka, self._kafka.dead_topic)
        FeedbackLog.open(self._log_path, checkpoint_interval=self._features.checkpoint_interval)
        target = self._target = CatchUp(self._kafka, self._log_path) if until_caught_up else None
        if target is not None and target.reached({}):
            return self.report
        # The log, not Kafka, says where to begin: nothing is committed automatically.
        self._consumer, self._assignment = join_group(self._kafka, self._settings, self._settings.group)
        try:
            with cyclic_collector_off():
                while not self._stopping:
                    if target is not None and self._landed_all() and target.reached(self._next):
                        break
                    self._step()
                self._drain()
        finally:
            self._close()
        logger.info("ingest worker ended rows=%d refused=%d", self.report.rows, self.report.refused)
        return self.report

    # -- the loop ------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Poll once, decode what came, land what is due."""
        polled = self._poll()
        if self._assignment.generation != self._generation or replaced(self._consumer, self._identity):
            self._claim()  # what was just polled is dropped with the rest: the position is sought again
            return
        self._take(polled)
        if self._in_flight is not None and self._in_flight.done() and not self._settle():
            return
        if self._due() and self._settle():
            self._hand_over()
        self._advance_watermark()

    def _poll(self) -> dict[TopicPartition, list[Any]]:
        try:
            return poll_group(
                self._consumer,
                self._assignment,
                timeout_ms=int(1000 * min(0.25, self._settings.linger_s / 4)),
                max_records=self._settings.poll_records,
            )
        except OffsetOutOfRangeError:
            self._give_up_position()
        except KafkaError as error:
            self._failed("poll", error)
        return {}

    def _take(self, polled: dict[TopicPartition, list[Any]]) -> None:
        """Decode what came; records below the position (fetched before a seek) are not ours to land again."""
        now = self._clock()
        self._idle.note(self._next, [tp.partition for tp in polled])
        for topic_partition, records in polled.items():
            partition = topic_partition.partition
            expected = self._next.get(partition)
            if expected is None:
                continue
            taken = [
                Record(r.value, partition, r.offset, r.timestamp) for r in records if r.offset >= expected
            ]
            if not taken:
                continue
            self._refused += self._batch.add(taken, now=now)
            self._next[partition] = taken[-1].offset + 1
            if self._batch_since is None:
                self._batch_since = time.monotonic()
            if self.report.first_taken_at is None:
                self.report.first_taken_at = now

    def _landed_all(self) -> bool:
        """Whether everything before ``_next`` has landed: then those are offsets that the log knows."""
        return self._generation >= 0 and self._batch_since is None and self._in_flight is None

    def _due(self) -> bool:
        if self._batch_since is None:
            return False
        old = time.monotonic() - self._batch_since >= self._settings.linger_s
        if self._target is not None and self._target.taken(self._next):
            old = True  # nothing more to wait for
        # While a batch is landing the next one may grow: then it is handed over when that one is done.
        free = self._in_flight is None
        held = len(self._batch) + len(self._refused)
        large = held >= self._settings.batch_rows * (1 if free else 2)
        return large or (old and free)

    def _hand_over(self) -> None:
        """Give the batch to the landing thread; at most one is on its way."""
        if self._batch_since is None:
            return
        batch, refused = self._batch, self._refused
        self._batch, self._refused, self._batch_since = InteractionBatch.of(self._features), [], None
        self._in_flight_rows = len(batch)
        self._in_flight = self._thread.submit(self._landing.land, batch, refused)
        self.report.refused_by_reason.update(one.reason for one in refused)

    def _settle(self) -> bool:
        """Wait for the batch on its way and count it; False when it did not land: then claim again.

        What was decoded after a batch that failed must not land before it: nothing is handed over until
        ``_claim`` has dropped it (and Landing takes nothing until it is claimed again).
        """
        future, self._in_flight = self._in_flight, None
        if future is None:
            return True
        try:
            landed = future.result()
        except (LogConflict, DeadLettersRefused, LogUnwritable) as error:
            self.report.dropped_rows += self._in_flight_rows
            self._failed("landing", error)
            return False
        self._failures = 0
        self.report.rows += landed.rows
        self.report.refused += landed.refused
        self.report.forgotten += landed.forgotten
        self.report.commits += 1
        self.report.last_landed_at = self._clock()
        self._advise(landed.next_offsets)
        return True

    def _drain(self) -> None:
        """Land what is held, once; a failure here loses nothing, the next worker lands it."""
        if self._settle() and self._assignment.generation == self._generation:
            self._hand_over()
            self._settle()

    # -- positions -----------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Steps 1 and 4: drop what is held, read the owned partitions' offsets from the log, seek there."""
        self._drop()
        generation, owned = self._assignment.current()
        if not owned:
            self._generation = generation
            return
        try:
            self._identity = identify(self._kafka)
            if replaced(self._consumer, self._identity):
                raise StaleMetadata("the client still fetches from an earlier life of the topic")
            partitions = [tp.partition for tp in owned]
            last = self._thread.submit(self._landing.claim, self._identity, partitions).result()
            first = self._consumer.beginning_offsets(list(owned))
            for tp in sorted(owned):
                self._place(tp, last[tp.partition], first[tp])
        except (BrokerUnreachable, TopicMissing, LogUnwritable, KafkaError, ValueError) as error:
            # ValueError: the partition was revoked while we read; the changed generation brings us back here.
            self._next = {}
            self._failed("claim", error)
            return
        self._generation = generation
        self.report.claims += 1
        logger.info("claimed group=%s positions=%s", self._settings.group, sorted(self._next.items()))

    def _place(self, tp: TopicPartition, last: int | None, first: int) -> None:
        position = 0 if last is None else last + 1
        if position < first:
            if last is not None and self._settings.lost_offsets == "stop":
                raise OffsetsLost(
                    f"partition {tp.partition}: events {position} to {first - 1} left the topic before they "
                    "landed; keep its events longer, and set ingest.lost_offsets to skip to go on behind them"
                )
            logger.error("events lost partition=%d from=%d to=%d", tp.partition, position, first - 1)
            position = first
        self._consumer.seek(tp, position)
        self._consumer.resume(tp)
        self._next[tp.partition] = position

    def _drop(self) -> None:
        """Forget every row that has not landed; a batch on its way is waited for first."""
        self._settle()
        self.report.dropped_rows += len(self._batch)
        self._batch, self._refused, self._batch_since = InteractionBatch.of(self._features), [], None
        self._next = {}
        self._idle.forget()

    def _give_up_position(self) -> None:
        """The broker says a position is out of range: claim again when that may cure it, else say so."""
        try:
            another = identify(self._kafka) != self._identity
            ends = reach(self._kafka)
        except (BrokerUnreachable, TopicMissing) as error:
            self._failed("position", error)
            return
        self._generation = -1
        for partition, position in self._next.items() if not another else ():  # a new life: its own zero
            if position > ends[partition].end:
                raise OffsetsLost.beyond(partition, position, ends[partition].end)

    def _failed(self, doing: str, error: Exception) -> None:
        """Step 4 and a growing pause; gives up after many failed landings in a row, or when none can work."""
        self._failures += 1
        if isinstance(error, LogConflict):
            self.report.conflicts += 1
        if isinstance(error, LogUnwritable):
            patience = _LOG_UNWRITABLE if self._target is None else 1  # a script is told at once
        else:
            patience = _LANDINGS_FAILED
        if self._failures >= patience and (doing == "landing" or isinstance(error, LogUnwritable)):
            raise error
        logger.warning("retrying doing=%s failures=%d cause=%s", doing, self._failures, error)
        if doing != "poll":
            self._generation, self._next = -1, {}
        back_off(self._failures, lambda: self._stopping)

    # -- Kafka's own view, and the watermark ---------------------------------------------------------------

    def _advise(self, next_offsets: dict[int, int]) -> None:
        """Commit offsets to Kafka, for lag tools only: nobody reads them to decide where to begin."""
        topic = self._kafka.topic
        try:
            self._consumer.commit_async(
                {TopicPartition(topic, p): OffsetAndMetadata(at, "", -1) for p, at in next_offsets.items()}
            )
        except KafkaError as error:
            logger.info("advisory offsets not committed cause=%s", error)

    def _advance_watermark(self) -> None:
        """Partitions that are idle and caught up tell the log so, or no attribution window would close."""
        if self._in_flight is not None:
            return
        held = self._batch.last_offsets()
        at_ms = self._idle.mark(self._clock().timestamp() * 1000)
        landed = {partition: at for partition, at in self._next.items() if partition not in held}
        try:
            caught_up = self._idle.caught_up(self._consumer, landed)
            if caught_up and self._assignment.generation == self._generation:
                self._thread.submit(self._landing.advance, caught_up, at_ms).result()
                self._failures = 0
                collect_cycles()
        except OffsetsLost:
            self._give_up_position()
        except KafkaError as error:
            logger.info("watermark not advanced cause=%s", error)  # no answer: nobody knows who is caught up
        except (LogConflict, LogUnwritable) as error:
            self._failed("watermark", error)

    def _close(self) -> None:
        self._thread.shutdown(wait=True)
        leave_group(self._consumer)
        self._dead_letters.close()
