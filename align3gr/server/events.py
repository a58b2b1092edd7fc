"""Sends events to Kafka from a thread of its own, so that no recommendation ever waits for a broker.

Two ways in: ``record`` (what was served) returns at once and drops, counted, when too much waits;
``publish`` (posted feedback) gives a future that is done when Kafka has acknowledged. What a broker did not
acknowledge is sent again with the same event_id: readers keep one. A broker that is away when we start or
later is tried again; nothing here ends the server.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Protocol

from features.errors import ProductError
from features.interactions import Interaction
from ingest.producer import DeliveryReport

from .metrics import ServerMetrics

log = logging.getLogger(__name__)

_BATCH = 2_000
"""Events sent between two waits for acknowledgement."""
_RETRY_SECONDS = 1.0


class Producer(Protocol):
    """The part of ``ingest.FeedbackProducer`` that is used here."""

    def send(self, interaction: Interaction) -> None:
        """Queue one event."""
        ...

    def flush(self, timeout_s: float | None = None) -> DeliveryReport:
        """Wait for what was sent."""
        ...

    def report(self) -> DeliveryReport:
        """What is known so far."""
        ...

    def close(self, timeout_s: float | None = None) -> DeliveryReport:
        """Let go."""
        ...


@dataclass(frozen=True)
class _Posted:
    interactions: Sequence[Interaction]
    done: "Future[int]"
    until: float


class NotRecorded(ProductError):  # noqa: N818 - reads as what it is
    """Kafka did not acknowledge posted feedback in time; sending it again is safe."""


class EventRecorder:
    """One thread, one producer. ``open_producer`` is called there, again after every failure."""

    def __init__(
        self,
        open_producer: Callable[[], Producer],
        metrics: ServerMetrics,
        *,
        queue: int,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open, self._metrics, self._clock = open_producer, metrics, clock
        self._limit, self._timeout = queue, timeout_seconds
        self._served: deque[Interaction] = deque()
        self._posted: deque[_Posted] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._deadline = float("inf")
        self._producer: Producer | None = None
        self.error: str | None = None
        """Why Kafka takes nothing right now; None while it does."""
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def record(self, interactions: Sequence[Interaction]) -> None:
        """Queue what was served; never waits, drops (counted) what does not fit."""
        with self._wake:
            room = max(0, self._limit - len(self._served))
            self._served.extend(interactions[:room])
            self._wake.notify()
        if room < len(interactions):
            self._metrics.events.labels("dropped").inc(len(interactions) - room)
        self._metrics.waiting_events.set(len(self._served))

    def publish(self, interactions: Sequence[Interaction]) -> "Future[int]":
        """Queue posted feedback; the future holds the number acknowledged, or raises NotRecorded."""
        done: Future[int] = Future()
        with self._wake:
            self._posted.append(_Posted(interactions, done, self._clock() + self._timeout))
            self._wake.notify()
        return done

    @property
    def waiting(self) -> int:
        """Served events that wait for Kafka."""
        return len(self._served)

    def stop(self, drain_seconds: float) -> int:
        """Send what waits, for at most ``drain_seconds``; the number of events left behind."""
        with self._wake:
            self._stopping = True
            self._deadline = self._clock() + drain_seconds
            self._wake.notify()
        self._thread.join(timeout=drain_seconds + 5)
        left = len(self._served)
        if left:
            self._metrics.events.labels("dropped").inc(left)
            log.warning("served_events=%d left=unrecorded cause=%s", left, self.error)
        return left

    def _run(self) -> None:
        while self._await_work():
            served, posted = self._take()
            if self._sent(served, posted):
                continue
            with self._wake:
                self._served.extendleft(reversed(served))
                if not self._stopping:
                    self._wake.wait(_RETRY_SECONDS)
        self._let_go(1.0)

    def _let_go(self, timeout_seconds: float) -> None:
        producer, self._producer = self._producer, None
        if producer is None:
            return
        try:
            producer.close(timeout_seconds)
        except Exception as error:  # noqa: BLE001 - a client that cannot even close must not end the thread
            log.warning("kafka=not_closed cause=%s", error)

    def _await_work(self) -> bool:
        """Wait until there is something to send; False when it is time to end."""
        with self._wake:
            while not (self._served or self._posted or self._stopping):
                self._wake.wait(1.0)
            if self._stopping:
                return bool(self._served or self._posted) and self._clock() < self._deadline
            return True

    def _take(self) -> tuple[list[Interaction], list[_Posted]]:
        with self._wake:
            posted = list(self._posted)
            self._posted.clear()
            return [self._served.popleft() for _ in range(min(_BATCH, len(self._served)))], posted

    def _sent(self, served: list[Interaction], posted: list[_Posted]) -> bool:
        """Send one batch and wait for its acknowledgement; False when ``served`` has to be sent again."""
        try:
            producer = self._producer = self._producer or self._open()
            before = producer.report().acknowledged
            for interaction in served:
                producer.send(interaction)
            for post in posted:
                for interaction in post.interactions:
                    producer.send(interaction)
            report = producer.flush(self._timeout)
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the server goes on recording
            self._away(" ".join(str(error).split()) or type(error).__name__, served, posted)
            return False
        failed = {(event.user_id, event.event_id): event.reason for event in report.failed}
        self._metrics.events.labels("acknowledged").inc(report.acknowledged - before)
        if not failed:
            self.error = None
            for post in posted:
                _resolve(post.done, len(post.interactions))
            self._metrics.waiting_events.set(len(self._served))
            return True
        reason = next(iter(failed.values()))
        self._metrics.events.labels("failed").inc(len(failed))
        for post in posted:
            missed = [one for one in post.interactions if (one.user_id, one.event_id) in failed]
            _resolve(post.done, NotRecorded(_again(reason)) if missed else len(post.interactions))
        missed_served = [one for one in served if (one.user_id, one.event_id) in failed]
        served[:] = missed_served
        self._away(reason, served, [])
        return not served

    def _away(self, reason: str, served: Sequence[Interaction], posted: Sequence[_Posted]) -> None:
        """Say it, let the producer go (its failures would only pile up), fail what cannot wait longer."""
        if self.error != reason:
            log.warning("kafka=away cause=%s served_waiting=%d", reason, len(served) + len(self._served))
        self.error = reason
        self._let_go(0.0)
        now = self._clock()
        waiting = [post for post in posted if post.until > now and not self._stopping]
        for post in posted:
            if post not in waiting:
                _resolve(post.done, NotRecorded(_again(reason)))
        with self._wake:
            self._posted.extendleft(reversed(waiting))


def _again(reason: str) -> str:
    return f"Kafka did not acknowledge the feedback ({reason}); send it again with the same event_ids"


def _resolve(done: "Future[int]", outcome: int | NotRecorded) -> None:
    """Give the outcome to who waits; who has gone away does not care."""
    try:
        if isinstance(outcome, NotRecorded):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)
    except InvalidStateError:
        log.debug("feedback=answered_already")
