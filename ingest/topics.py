"""What exists on the cluster: topics, their identity, and how far they reach.

A topic is identified by cluster id *and* topic id: one that is deleted and created again is another topic
with offsets of its own. The end of a partition is taken from a fetch's high watermark, not from ListOffsets:
the embedded broker's ListOffsets is short by all but the first record of the last batch.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import (
    KafkaConfigurationError,
    KafkaError,
    SaslAuthenticationFailedError,
    TopicAlreadyExistsError,
)

from .errors import BrokerUnreachable, IngestError, TopicMissing, UnusableKafkaSettings
from .settings import KafkaSettings

Client = TypeVar("Client")

_UNKNOWN_TOPIC = 3
"""Kafka's error code UNKNOWN_TOPIC_OR_PARTITION."""


@dataclass(frozen=True)
class TopicIdentity:
    """One life of one topic: the cluster it is on, its name, its id in that cluster, its partitions."""

    cluster: str
    topic: str
    topic_id: str
    partitions: tuple[int, ...]

    @property
    def life(self) -> str:
        """Cluster and topic id in one: what the log's app ids begin with. No slash in it."""
        return f"{self.cluster}@{self.topic_id}".replace("/", "-")


@dataclass(frozen=True)
class Reach:
    """First offset a partition still holds, and the one its next record will get."""

    first: int
    end: int


def connect(client: Callable[..., Client], settings: KafkaSettings, **options: Any) -> Client:
    """A kafka-python client (its class given) that has spoken to a broker.

    Raises UnusableKafkaSettings when the client refuses an option, BrokerUnreachable when nobody answers.
    """
    try:
        return client(**{**settings.connection(), **options})
    except (KafkaConfigurationError, AssertionError, ValueError) as error:
        raise UnusableKafkaSettings(f"kafka settings: {error}: correct them in the settings file") from error
    except SaslAuthenticationFailedError as error:
        raise UnusableKafkaSettings(
            f"the broker at {settings.bootstrap_servers} refused the credentials: "
            "set kafka.sasl_plain_username and kafka.sasl_plain_password"
        ) from error
    except (KafkaError, OSError) as error:
        raise _unreachable(settings) from error


@contextmanager
def _answering(settings: KafkaSettings) -> Iterator[None]:
    """A broker that stops answering half-way is, to a person, one that does not answer."""
    try:
        yield
    except (KafkaError, OSError) as error:
        raise _unreachable(settings) from error


def _unreachable(settings: KafkaSettings) -> BrokerUnreachable:
    return BrokerUnreachable(
        f"no Kafka broker answers at {settings.bootstrap_servers} "
        f"within {settings.connect_timeout_s:g} s: start one with `align3gr broker`, "
        "or set kafka.bootstrap_servers"
    )


def create_topics(settings: KafkaSettings) -> list[str]:
    """Create the interactions topic and the dead-letter topic where they are missing; the names created.

    Record timestamps are set by the broker (LogAppendTime), so that arrival is one clock; the embedded broker
    accepts the setting and keeps the producer's time.
    """
    stamped = {"message.timestamp.type": "LogAppendTime"}
    # A dead letter is the original bytes plus headers: its topic must take more than the other one.
    wanted = {settings.topic: stamped, settings.dead_topic: {**stamped, "max.message.bytes": "4194304"}}
    created = []
    with connect(KafkaAdminClient, settings) as admin:
        for topic, configs in wanted.items():
            try:
                admin.create_topics(
                    {
                        topic: {
                            "num_partitions": settings.partitions if topic == settings.topic else 1,
                            "replication_factor": settings.replication_factor,
                            "configs": configs,
                        }
                    },
                    wait_for_metadata=True,
                )
                created.append(topic)
            except TopicAlreadyExistsError:
                continue
            except KafkaError as error:
                raise IngestError(f"topic {topic} cannot be created: {error}") from error
    return created


def identify(settings: KafkaSettings, topic: str | None = None) -> TopicIdentity:
    """The life of ``topic`` (default: the interactions topic) that the cluster holds now.

    Raises BrokerUnreachable, or TopicMissing naming the topic and the command that makes it.
    """
    topic = topic or settings.topic
    with _answering(settings), connect(KafkaAdminClient, settings) as admin:
        cluster = admin.describe_cluster()["cluster_id"]
        (described,) = admin.describe_topics([topic])
    if described["error_code"] == _UNKNOWN_TOPIC or not described["partitions"]:
        raise TopicMissing(
            f"topic {topic} does not exist on {settings.bootstrap_servers}: "
            "make it with `align3gr broker topics`, or set kafka.topic"
        )
    return TopicIdentity(
        cluster=str(cluster),
        topic=topic,
        topic_id=str(described["topic_id"]),
        partitions=tuple(sorted(part["partition_index"] for part in described["partitions"])),
    )


def replaced(consumer: KafkaConsumer, identity: TopicIdentity) -> bool:
    """Whether ``consumer``'s metadata, by which it fetches, names another cluster or topic id than ours."""
    metadata = consumer._cluster  # kafka-python has no public way to ask for them
    cluster, topic_id = metadata.cluster_id, metadata.topic_id(identity.topic)
    return cluster not in (None, identity.cluster) or str(topic_id or identity.topic_id) != identity.topic_id


def reach(settings: KafkaSettings, topic: str | None = None, *, timeout_s: float = 10.0) -> dict[int, Reach]:
    """First and end offset of every partition of ``topic``, right on both kinds of broker.

    Raises BrokerUnreachable, TopicMissing.
    """
    identity = identify(settings, topic)
    with _answering(settings), connect(
        KafkaConsumer, settings, group_id=None, enable_auto_commit=False, auto_offset_reset="none",
        fetch_max_wait_ms=50,
    ) as consumer:  # fmt: skip
        return reach_of(consumer, [TopicPartition(identity.topic, p) for p in identity.partitions], timeout_s)


def read_all(settings: KafkaSettings, topic: str, *, timeout_s: float = 60.0) -> Iterator[Any]:
    """Every record that ``topic`` holds now, each partition's in order (kafka-python's ConsumerRecord).

    Raises BrokerUnreachable, TopicMissing, and IngestError when the end is not reached in ``timeout_s``.
    """
    identity = identify(settings, topic)
    partitions = [TopicPartition(topic, partition) for partition in identity.partitions]
    with _answering(settings), connect(
        KafkaConsumer, settings, group_id=None, enable_auto_commit=False, auto_offset_reset="none",
        fetch_max_wait_ms=100,
    ) as consumer:  # fmt: skip
        ends = reach_of(consumer, partitions, timeout_s)
        for partition in partitions:
            consumer.seek(partition, ends[partition.partition].first)
        deadline = time.monotonic() + timeout_s
        while any(consumer.position(p) < ends[p.partition].end for p in partitions):
            if time.monotonic() > deadline:
                raise IngestError(f"topic {topic} was not read to its end within {timeout_s:g} s: try again")
            for records in consumer.poll(timeout_ms=200, max_records=10_000).values():
                yield from records


def reach_of(
    consumer: KafkaConsumer, partitions: Iterable[TopicPartition], timeout_s: float
) -> dict[int, Reach]:
    """First and end offsets by ``consumer``, which must not be subscribed; it is left assigned."""
    partitions = list(partitions)
    first = consumer.beginning_offsets(partitions)
    end = consumer.end_offsets(partitions)
    consumer.assign(partitions)
    for partition in partitions:
        consumer.seek(partition, end[partition])
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        consumer.poll(timeout_ms=100)
        highs = {partition: consumer.highwater(partition) for partition in partitions}
        if all(high is not None for high in highs.values()):
            return {p.partition: Reach(first[p], max(end[p], highs[p])) for p in partitions}
    raise IngestError(
        f"the broker did not say within {timeout_s:g} s how far its partitions reach: "
        "see its log, then try again"
    )
