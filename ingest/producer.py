"""The way in for event producers: typed interactions, batched, keyed by user, every one accounted for.

An event counts as acknowledged only when the broker said so for all in-sync replicas (acks=all, idempotent).
Whatever else becomes of an event (refused, too large, timed out, the process gave up waiting) it is reported
with its reason; an undelivered event may still have been stored when only the answer was lost, which is why
readers deduplicate by (user_id, event_id).
"""

import threading
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError

from features.interactions import Interaction, encode_interaction

from .settings import KafkaSettings
from .topics import connect, identify

_MAX_OUTSTANDING = 50_000
"""Events in memory without an answer; above it ``send`` waits (kafka-python itself has no bound)."""
_SETTLE_EVERY = 1_024


@dataclass(frozen=True)
class Undelivered:
    """One event that no broker acknowledged, and why."""

    event_id: str
    user_id: str
    reason: str


@dataclass(frozen=True)
class DeliveryReport:
    """What became of every event sent since the producer was opened."""

    acknowledged: int
    failed: list[Undelivered]


class FeedbackProducer:
    """Publishes interactions to the topic of ``settings``; safe to share between threads.

    As a context manager it flushes on exit. Invariant after ``flush``: sent = acknowledged + len(failed).

    Raises BrokerUnreachable and TopicMissing when it is made.
    """

    def __init__(self, settings: KafkaSettings, *, topic: str | None = None) -> None:
        self.settings = settings
        self.topic = topic or settings.topic
        identify(settings, self.topic)
        delivery_ms = int(settings.delivery_timeout_s * 1000)
        options: dict[str, Any] = {
            "acks": "all",
            "linger_ms": 20,
            "batch_size": 131_072,
            "compression_type": None if settings.compression == "none" else settings.compression,
            "delivery_timeout_ms": delivery_ms,
            # Two attempts must fit into the delivery time, or one silent broker eats all of it.
            "request_timeout_ms": max(1000, min(10_000, delivery_ms // 2)),
            "max_block_ms": delivery_ms,
        }
        self._producer = connect(KafkaProducer, settings, **{**options, **settings.client_options})
        self._lock = threading.Lock()
        self._outstanding: deque[tuple[Any, str, str]] = deque()
        self._since_settled = 0
        self._acknowledged = 0
        self._failed: list[Undelivered] = []

    def send(self, interaction: Interaction) -> None:
        """Queue ``interaction``, keyed by its user_id; waits only while too many are unanswered.

        Never raises for an event that cannot be delivered: ``flush`` reports it.
        """
        self.send_encoded(interaction.event_id, interaction.user_id, encode_interaction(interaction))

    def send_encoded(
        self, event_id: str, user_id: str, value: bytes, headers: list[tuple[str, bytes]] | None = None
    ) -> None:
        """Queue an event that is already JSON (a dead letter's replay, an importer's template)."""
        try:
            future = self._producer.send(self.topic, value=value, key=user_id.encode(), headers=headers)
        except (KafkaError, ValueError) as error:
            with self._lock:
                self._failed.append(Undelivered(event_id, user_id, _reason(error)))
            return
        with self._lock:
            self._outstanding.append((future, event_id, user_id))
            self._since_settled += 1
            if self._since_settled >= _SETTLE_EVERY:
                self._settle()
            oldest = self._outstanding[0][0] if len(self._outstanding) >= _MAX_OUTSTANDING else None
        if oldest is not None:
            self._wait_for(oldest)

    def flush(self, timeout_s: float | None = None) -> DeliveryReport:
        """Send what is queued and wait for its answers; the report over everything sent so far.

        ``timeout_s`` (default: the delivery timeout and a little) bounds the wait; what has no answer then is
        reported as failed.
        """
        wait = timeout_s if timeout_s is not None else self.settings.delivery_timeout_s + 5.0
        try:
            self._producer.flush(timeout=wait)
        except KafkaTimeoutError:
            reason = f"no answer from the broker within {wait:g} s"
        else:
            reason = "no answer from the broker"
        with self._lock:
            self._settle()
            while self._outstanding:
                future, event_id, user_id = self._outstanding.popleft()
                self._account(future, event_id, user_id, reason)
            return DeliveryReport(self._acknowledged, list(self._failed))

    def report(self) -> DeliveryReport:
        """What is known so far, without waiting: events still under way are in neither part."""
        with self._lock:
            self._settle()
            return DeliveryReport(self._acknowledged, list(self._failed))

    def close(self, timeout_s: float | None = None) -> DeliveryReport:
        """Flush, then let the connection go."""
        report = self.flush(timeout_s)
        try:
            self._producer.close(timeout=0 if report.failed else 5)
        except KafkaTimeoutError:
            # kafka-python flushes before it closes, and leaves its sender running when that takes too long.
            self._producer._sender.force_close()
        return report

    def __enter__(self) -> "FeedbackProducer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settle(self) -> None:
        """Account for the answered events at the head of the queue; the caller holds the lock."""
        self._since_settled = 0
        outstanding = self._outstanding
        while outstanding and outstanding[0][0].is_done:
            self._account(*outstanding.popleft(), "")

    def _account(self, future: Any, event_id: str, user_id: str, unanswered: str) -> None:
        if future.succeeded():
            self._acknowledged += 1
        else:
            reason = _reason(future.exception) if future.is_done else unanswered
            self._failed.append(Undelivered(event_id, user_id, reason))

    def _wait_for(self, future: Any) -> None:
        try:
            future.get(timeout=self.settings.delivery_timeout_s + 5.0)
        except KafkaError:
            return  # it has failed and is accounted for with its reason when the queue is settled


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
