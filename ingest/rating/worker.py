"""One rating worker: reviews without stars from the topic, their ratings back into it.

At least once is enough: a rating's id follows from its review and the rater's version, so one that is
published again after a crash is the same event to every reader. Hence the plain protocol: rate some reviews,
publish, wait until every rating is acknowledged, then commit the offsets to the consumer group. Whatever goes
wrong has one answer: forget the position, pause, begin again at the group's offsets.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError, StaleMetadata
from kafka.structs import OffsetAndMetadata

from features.interactions import LATEST_AHEAD, Interaction, InvalidInteraction, decode_until
from features.settings import FeatureSettings
from ingest.assignment import Assignment
from ingest.back_off import back_off
from ingest.clock import utc_now
from ingest.errors import BrokerUnreachable, IngestError, TopicMissing
from ingest.group import join_group, leave_group, poll_group
from ingest.producer import FeedbackProducer
from ingest.settings import IngestSettings, KafkaSettings
from ingest.topics import TopicIdentity, identify, reach, replaced

from .rater import Rater, rating_of, wants_rating

logger = logging.getLogger(__name__)

_POLL_MS = 250
_LOOK_EVERY_S = 0.5
_AWAY_S = 60.0
"""Seconds without a poll; Kafka takes a worker for dead after 300."""
_LEAVE_S = 3.0
"""When asked to stop, how long to wait for acknowledgements that are under way."""


@dataclass
class RatingReport:
    """What one worker did since it started."""

    events: int = 0
    """Events read, whatever they were."""
    with_stars: int = 0
    """Reviews that carry a value: nothing to do, ingest knows their level."""
    silent: int = 0
    """Reviews in which the rater found nothing that says anything."""
    rated: int = 0
    """Ratings that the broker acknowledged."""
    by_rating: Counter[int] = field(default_factory=Counter)
    """Rating -> how many of it were acknowledged."""
    claims: int = 0
    """Times that positions were read from the group: once for each rebalance and each failure."""
    rater: str = ""
    """Version of the rater."""

    def facts(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**vars(self), "by_rating": {str(n): self.by_rating[n] for n in sorted(self.by_rating)}}


@dataclass(frozen=True)
class _Portion:
    """Some records of one partition: the reviews to rate among them, and where the next portion begins."""

    partition: TopicPartition
    reviews: list[Interaction]
    events: int
    with_stars: int
    next_offset: int


class RatingWorker:
    """Rates the topic's reviews as one member of the consumer group ``settings.rating.group``.

    ``run`` returns after ``stop`` (safe from a signal handler); what it has not committed then is rated by
    the next worker. Raises BrokerUnreachable and TopicMissing at the start, IngestError when Kafka refuses
    us.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        ingest: IngestSettings,
        features: FeatureSettings,
        rater: Rater,
        *,
        from_start: bool = False,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """``from_start``: read the topic again from its first event, as a new rater version wants."""
        self._kafka, self._ingest, self._settings = kafka, ingest, ingest.rating
        self._features, self._rater, self._clock = features, rater, clock
        self._stopping = False
        self._from_start = from_start
        self._begun: set[int] = set()
        """Partitions whose offsets in the group are this run's own, or were to be gone on from."""
        self._consumer: KafkaConsumer
        self._assignment: Assignment
        self._identity: TopicIdentity
        self._producer: FeedbackProducer | None = None
        self._generation = -1
        self._next: dict[int, int] = {}
        """Partition -> offset of the next record to rate; everything before it is committed."""
        self._failures = 0
        self._looked_at = float("-inf")
        self._joined_by = 0.0
        """When a worker without partitions is one that the group has none for."""
        self.report = RatingReport(rater=rater.version)

    def stop(self) -> None:
        """Ask ``run`` to return."""
        self._stopping = True  # no Event: setting one in a signal handler may deadlock with its waiter

    def run(self, *, until_caught_up: bool = False) -> RatingReport:
        """Work until ``stop``, or until what the topic held at the start has been seen (by any worker)."""
        self._identity = identify(self._kafka)
        target = {p: at.end for p, at in reach(self._kafka).items() if at.end > at.first}
        self._consumer, self._assignment = join_group(self._kafka, self._ingest, self._settings.group)
        self._joined_by = time.monotonic() + 2 * self._ingest.session_timeout_s
        try:
            while not self._stopping and not (until_caught_up and self._reached(target)):
                self._step()
        finally:
            self._close()
        logger.info("rating worker ended rated=%d with_stars=%d", self.report.rated, self.report.with_stars)
        return self.report

    # -- the loop ------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Poll once and rate what came, portion by portion."""
        polled = self._poll()
        if self._assignment.generation != self._generation or replaced(self._consumer, self._identity):
            self._claim()
            return
        poll_again = time.monotonic() + _AWAY_S
        for portion in self._portions(polled):
            if self._stopping or self._assignment.generation != self._generation:
                return  # not committed: the next owner rates them
            if time.monotonic() > poll_again:
                self._seek_back()
                return
            if not self._publish(portion):
                return
            self._next[portion.partition.partition] = portion.next_offset
            self._commit(portion)

    def _poll(self) -> dict[TopicPartition, list[Any]]:
        try:
            return poll_group(self._consumer, self._assignment, timeout_ms=_POLL_MS)
        except OffsetOutOfRangeError:
            self._generation = -1  # the topic dropped events we had not read: begin at its first
        except KafkaError as error:
            self._failed("poll", error)
        return {}

    def _portions(self, polled: dict[TopicPartition, list[Any]]) -> Iterator[_Portion]:
        """Records in order, cut where a batch of reviews is full; events that cannot be read are ingest's."""
        latest = self._clock() + LATEST_AHEAD
        size = self._settings.batch_reviews
        for partition, records in polled.items():
            expected = self._next.get(partition.partition)
            if expected is None:
                continue
            reviews: list[Interaction] = []
            events = with_stars = 0
            at = expected
            for record in records:
                if record.offset < expected:  # fetched before a seek
                    continue
                at, events = record.offset + 1, events + 1
                event = self._decoded(record.value, latest)
                if event is not None and event.kind in self._settings.kinds:
                    with_stars += event.value is not None
                    if wants_rating(event, self._settings):
                        reviews.append(event)
                if len(reviews) == size:
                    yield _Portion(partition, reviews, events, with_stars, at)
                    reviews, events, with_stars = [], 0, 0
            if events:
                yield _Portion(partition, reviews, events, with_stars, at)

    def _decoded(self, raw: bytes | None, latest: datetime) -> Interaction | None:
        features = self._features
        try:
            return decode_until(raw or b"", latest, features.max_event_bytes, features.earliest_event)
        except InvalidInteraction:
            return None

    def _publish(self, portion: _Portion) -> bool:
        """Rate the portion and publish; False when some rating has no acknowledgement."""
        stars = self._rater.rate([review.text or "" for review in portion.reviews])
        said = [(review, n) for review, n in zip(portion.reviews, stars, strict=True) if n is not None]
        try:
            if said and not self._acknowledged(
                [rating_of(review, n, self._rater.version) for review, n in said]
            ):
                return False
        except (BrokerUnreachable, TopicMissing) as error:
            self._failed("publish", error)
            return False
        self._failures = 0
        self.report.events += portion.events
        self.report.with_stars += portion.with_stars
        self.report.silent += len(stars) - len(said)
        self.report.rated += len(said)
        self.report.by_rating.update(n for _, n in said)
        return True

    def _acknowledged(self, ratings: list[Interaction]) -> bool:
        """Send ``ratings`` and wait for their answers; when asked to stop meanwhile, only a little longer."""
        if self._producer is None:
            self._producer = FeedbackProducer(self._kafka)
        before = self._producer.report().acknowledged
        for rating in ratings:
            self._producer.send(rating)
        leave_at = None
        while True:
            report = self._producer.report()
            if report.failed:
                first = report.failed[0]
                self._drop_producer()
                self._failed("publish", IngestError(f"{len(report.failed)} unacknowledged: {first.reason}"))
                return False
            if report.acknowledged - before == len(ratings):
                return True
            if self._stopping:
                leave_at = leave_at or time.monotonic() + _LEAVE_S
                if time.monotonic() > leave_at:
                    return False
            time.sleep(0.005)

    def _commit(self, portion: _Portion) -> None:
        """Tell the group; where that fails the ratings are published once more, and counted once."""
        at = OffsetAndMetadata(portion.next_offset, "", -1)
        try:
            self._consumer.commit({portion.partition: at})
        except KafkaError as error:
            self._failed("commit", error)

    def _seek_back(self) -> None:
        """Leave the rest of a poll to the next one: a slow rater must not look dead to the group."""
        for number, position in self._next.items():
            self._consumer.seek(TopicPartition(self._kafka.topic, number), position)

    # -- positions -----------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Read the owned partitions' offsets from the group and seek there."""
        self._next = {}
        generation, owned = self._assignment.current()
        if not owned:
            self._generation = generation
            return
        try:
            identity = identify(self._kafka)
            if (
                identity != self._identity
            ):  # a new life of the topic: the group's offsets belong to the old one
                self._identity, self._from_start, self._begun = identity, True, set()
            if replaced(self._consumer, self._identity):
                raise StaleMetadata("the client still fetches from an earlier life of the topic")
            ends = reach(self._kafka)
            for partition in sorted(owned):
                self._place(partition, ends[partition.partition].first, ends[partition.partition].end)
        except (BrokerUnreachable, TopicMissing, KafkaError, KeyError, ValueError) as error:
            # ValueError: the partition was revoked while we read; the changed generation brings us back here.
            self._failed("claim", error)
            return
        self._generation = generation
        self.report.claims += 1
        logger.info("claimed group=%s positions=%s", self._settings.group, sorted(self._next.items()))

    def _place(self, partition: TopicPartition, first: int, end: int) -> None:
        number = partition.partition
        again = self._from_start and number not in self._begun
        committed = None if again else self._consumer.committed(partition)
        # Beyond the end: the broker lost events, or the topic is another one. Rating again costs only time.
        position = first if committed is None or committed > end else max(first, committed)
        self._consumer.seek(partition, position)
        self._consumer.resume(partition)
        self._next[number] = position
        if again:
            self._consumer.commit({partition: OffsetAndMetadata(position, "", -1)})
        self._begun.add(number)

    def _reached(self, target: dict[int, int]) -> bool:
        """Whether everything below ``target`` was seen: by us, or by whoever owns the partition."""
        missing = [p for p, end in target.items() if self._next.get(p, -1) < end]
        if not missing:
            return True
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S or (not self._next and now < self._joined_by):
            return False
        self._looked_at = now
        others = [p for p in missing if p not in self._next]
        if len(others) < len(missing):
            return False
        try:
            return all(
                (self._consumer.committed(TopicPartition(self._kafka.topic, p)) or 0) >= target[p]
                for p in others
            )
        except KafkaError as error:
            self._failed("look", error)
            return False

    def _failed(self, doing: str, error: Exception) -> None:
        """Begin again at the group's offsets, after a growing pause."""
        self._failures += 1
        logger.warning("retrying doing=%s failures=%d cause=%s", doing, self._failures, error)
        if doing not in ("poll", "look"):
            self._generation, self._next = -1, {}
        back_off(self._failures, lambda: self._stopping)

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close(timeout_s=0.1)

    def _close(self) -> None:
        self._drop_producer()
        leave_group(self._consumer)
