"""Membership of a consumer group, as every worker has it: join, poll, leave.

What ends a worker for good (a damaged batch, a refusal by Kafka) is told from what another try may cure.
"""

import logging
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import (
    AuthorizationError,
    CorruptRecordError,
    KafkaError,
    SaslAuthenticationFailedError,
)

from .assignment import Assignment
from .errors import IngestError
from .settings import IngestSettings, KafkaSettings
from .topics import connect

logger = logging.getLogger(__name__)


def join_group(kafka: KafkaSettings, ingest: IngestSettings, group: str) -> tuple[KafkaConsumer, Assignment]:
    """A consumer of the interactions topic in ``group``, and what it is assigned; it commits nothing itself.

    Raises UnusableKafkaSettings, BrokerUnreachable.
    """
    options = {"group_id": group, **ingest.consumer()}
    consumer = connect(KafkaConsumer, kafka, **{**options, **kafka.client_options})
    assignment = Assignment(consumer)
    consumer.subscribe([kafka.topic], listener=assignment)
    return consumer, assignment


def poll_group(
    consumer: KafkaConsumer, assignment: Assignment, **options: Any
) -> dict[TopicPartition, list[Any]]:
    """What came, by partition; ``options`` as KafkaConsumer.poll has them.

    Raises IngestError where no further try can help, OffsetOutOfRangeError for a position that the topic does
    not hold, and any other KafkaError as it is.
    """
    assignment.keep_joining()
    try:
        return consumer.poll(**options)  # type: ignore[no-any-return]
    except CorruptRecordError as error:
        raise IngestError(f"a record batch on the broker is damaged ({error}): restore the topic") from error
    except (AuthorizationError, SaslAuthenticationFailedError) as error:
        raise IngestError(f"Kafka refuses this worker ({error}): grant it topic and group") from error


def leave_group(consumer: KafkaConsumer) -> None:
    """Close ``consumer``; a broker that does not answer takes it for dead after the session's time."""
    try:
        consumer.close(autocommit=False, timeout_ms=5000)
    except KafkaError as error:
        logger.info("group not left cleanly cause=%s", error)
