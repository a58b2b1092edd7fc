"""Dead letters: what could not be accepted, kept with its reason, its bytes and where it came from.

They lie in a Kafka topic of their own. A record's key is its coordinates (life of the topic, partition,
offset), so a letter that was published twice after a crash is one letter, and a record without a value under
the same key says that it was replayed.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, MessageSizeTooLargeError

from features.batch import Refused
from features.interactions import InvalidInteraction, decode_interaction
from features.settings import FeatureSettings

from .errors import DeadLettersRefused
from .producer import FeedbackProducer, Undelivered
from .settings import KafkaSettings
from .topics import TopicIdentity, connect, read_all

logger = logging.getLogger(__name__)

_MAX_REQUEST_BYTES = 4_194_304
_KEPT_WHEN_TOO_LARGE = 65_536
"""Bytes of an event kept in its letter when the broker takes no letter of its full size."""


@dataclass(frozen=True)
class DeadLetter:
    """One refused record."""

    life: str
    """Cluster and topic id that it was read from (TopicIdentity.life)."""
    topic: str
    partition: int
    offset: int
    reason: str
    """Reason code of InvalidInteraction."""
    message: str
    arrived_ms: int
    """Kafka's timestamp of the refused record, epoch milliseconds."""
    value: bytes
    """The original bytes (their beginning, when ``truncated``)."""
    truncated: bool

    @property
    def key(self) -> str:
        """Its coordinates, as the topic's key."""
        return _key(self.life, self.topic, self.partition, self.offset)


@dataclass(frozen=True)
class DeadLetterReplay:
    """What a replay did: letters sent again, those still refused by reason, and those no broker took."""

    replayed: int
    refused: dict[str, int]
    undelivered: list[Undelivered]


class DeadLetterBox:
    """Publishes refused records; connects at the first one. Not shared between threads."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings
        self._producer: KafkaProducer | None = None

    def publish(self, refused: Iterable[Refused], identity: TopicIdentity) -> None:
        """Send every record with its reason and coordinates, and wait until all are acknowledged.

        Raises DeadLettersRefused when one is not: the offset must not move past it then.
        """
        if self._producer is None:
            self._producer = _producer(self._settings)
        sent = [(one, self._send(self._producer, one, identity)) for one in refused]
        try:
            for one, future in sent:
                try:
                    future.get(timeout=self._settings.delivery_timeout_s + 5.0)
                except MessageSizeTooLargeError:
                    cut = self._send(self._producer, one, identity, cut=_KEPT_WHEN_TOO_LARGE)
                    cut.get(timeout=self._settings.delivery_timeout_s + 5.0)
        except KafkaError as error:
            raise DeadLettersRefused(
                f"topic {self._settings.dead_topic} takes no dead letter ({type(error).__name__}: {error}): "
                "check the broker and the topic; ingest waits and loses nothing"
            ) from error

    def close(self) -> None:
        """Let the connection go."""
        producer, self._producer = self._producer, None
        if producer is not None:
            _close(producer)

    def _send(
        self, producer: KafkaProducer, one: Refused, identity: TopicIdentity, cut: int | None = None
    ) -> Any:
        raw = one.record.raw
        value = raw or b""
        headers = {
            "reason": one.reason,
            "message": one.message,
            "life": identity.life,
            "topic": identity.topic,
            "partition": str(one.record.partition),
            "offset": str(one.record.offset),
            "arrived_ms": str(one.record.arrived_ms),
        }
        if cut is not None or len(value) > _MAX_REQUEST_BYTES - 65_536:
            value = value[: cut or _KEPT_WHEN_TOO_LARGE]
            headers["truncated_from_bytes"] = str(len(raw or b""))
        return producer.send(
            self._settings.dead_topic,
            key=_key(identity.life, identity.topic, one.record.partition, one.record.offset).encode(),
            value=value,
            headers=[(name, words.encode()) for name, words in headers.items()],
        )


def list_dead_letters(settings: KafkaSettings) -> list[DeadLetter]:
    """Letters that wait, oldest first, each once. Raises BrokerUnreachable, TopicMissing."""
    waiting: dict[bytes, DeadLetter] = {}
    for record in read_all(settings, settings.dead_topic):
        if record.value is None:
            waiting.pop(record.key, None)
            continue
        headers = {name: words.decode(errors="replace") for name, words in record.headers or ()}
        if "reason" not in headers:
            logger.warning("dead letter without a reason skipped=true offset=%d", record.offset)
            continue
        waiting[record.key] = DeadLetter(
            life=headers["life"],
            topic=headers["topic"],
            partition=int(headers["partition"]),
            offset=int(headers["offset"]),
            reason=headers["reason"],
            message=headers["message"],
            arrived_ms=int(headers["arrived_ms"]),
            value=record.value,
            truncated="truncated_from_bytes" in headers,
        )
    return list(waiting.values())


def replay_dead_letters(
    settings: KafkaSettings, features: FeatureSettings, *, now: datetime, reasons: Iterable[str] = ()
) -> DeadLetterReplay:
    """Send again every waiting letter that is acceptable by now (by ``reasons``, default: all).

    A letter is marked as replayed only after the broker acknowledged its event: a crash in between sends it
    twice with one event_id, which readers count once.
    """
    wanted = set(reasons)
    refused: Counter[str] = Counter()
    ready: dict[tuple[str, str], list[DeadLetter]] = {}
    with FeedbackProducer(settings) as producer:
        for letter in list_dead_letters(settings):
            if wanted and letter.reason not in wanted:
                continue
            try:
                if letter.truncated:
                    raise InvalidInteraction("oversized", "only its beginning was kept")
                event = decode_interaction(
                    letter.value,
                    now=now,
                    max_bytes=features.max_event_bytes,
                    earliest=features.earliest_event,
                )
            except InvalidInteraction as error:
                refused[error.reason] += 1
                continue
            ready.setdefault((event.user_id, event.event_id), []).append(letter)
            producer.send_encoded(
                event.event_id, event.user_id, letter.value, [("replayed", letter.key.encode())]
            )
        report = producer.flush()
    undelivered = {(one.user_id, one.event_id) for one in report.failed}
    landed = [one for pair, letters in ready.items() if pair not in undelivered for one in letters]
    _mark_replayed(settings, landed)
    return DeadLetterReplay(len(landed), dict(refused), report.failed)


def _mark_replayed(settings: KafkaSettings, letters: list[DeadLetter]) -> None:
    if not letters:
        return
    marks = _producer(settings)
    try:
        futures = [marks.send(settings.dead_topic, key=letter.key.encode(), value=None) for letter in letters]
        for future in futures:
            future.get(timeout=settings.delivery_timeout_s + 5.0)
    except KafkaError as error:
        raise DeadLettersRefused(
            f"{len(letters)} letters were replayed but not marked so ({type(error).__name__}): "
            "replaying them again sends events that readers count once"
        ) from error
    finally:
        _close(marks)


def _producer(settings: KafkaSettings) -> KafkaProducer:
    delivery_ms = int(settings.delivery_timeout_s * 1000)
    return connect(
        KafkaProducer, settings, acks="all", max_request_size=_MAX_REQUEST_BYTES,
        delivery_timeout_ms=delivery_ms, request_timeout_ms=max(1000, min(10_000, delivery_ms // 2)),
        max_block_ms=delivery_ms,
    )  # fmt: skip


def _close(producer: KafkaProducer) -> None:
    """Every letter was waited for, so nothing is lost by leaving when the broker is away."""
    try:
        producer.close(timeout=5)
    except KafkaError as error:
        logger.info("dead letters not closed in order cause=%s", error)


def _key(life: str, topic: str, partition: int, offset: int) -> str:
    return f"{life}/{topic}/{partition}/{offset}"


def letters_of(settings: KafkaSettings, user_id: str) -> list[DeadLetter]:
    """Waiting letters whose event says that it is of ``user_id``, also where it is no whole JSON."""
    spelt = {json.dumps(user_id), json.dumps(user_id, ensure_ascii=False)}
    pattern = re.compile("|".join(rf'"user_id"\s*:\s*{re.escape(one)}' for one in spelt).encode())
    return [one for one in list_dead_letters(settings) if pattern.search(one.value)]


def forget_letters(settings: KafkaSettings, user_id: str) -> int:
    """Mark the letters of ``user_id`` as gone: nobody lists or replays them any more; how many those were.

    The bytes leave the broker with the topic's retention (or its compaction: the mark has the letter's key);
    Kafka deletes no record by itself. Raises BrokerUnreachable, TopicMissing, DeadLettersRefused.
    """
    letters = letters_of(settings, user_id)
    _mark_replayed(settings, letters)
    return len(letters)
