"""Brokers and topics for tests: one process of each kind a session, topics of its own for each test."""

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pytest

from features.interactions import Interaction, Kind
from features.log import FeedbackLog
from ingest.broker import Broker, settings_for
from ingest.settings import KafkaSettings
from ingest.topics import create_topics

KINDS = ["embedded", pytest.param("kafka", marks=pytest.mark.kafka)]
"""Parameters of a fixture that runs a test on both brokers."""
NEEDS_KAFKA = "KAFKA_HOME names no Apache Kafka distribution, or there is no java"


def topics_on(broker: Broker, **changes: object) -> KafkaSettings:
    """Settings with two topics that no other test uses, made on ``broker``."""
    name = f"interactions-{uuid.uuid4().hex[:8]}"
    settings = settings_for(broker, KafkaSettings(partitions=2, connect_timeout_s=5, delivery_timeout_s=10))
    settings = settings.model_copy(update={"topic": name, "dead_topic": f"{name}.dead", **changes})
    create_topics(settings)
    return settings


def interaction(n: int, **changes: object) -> Interaction:
    """The n-th of a series of ratings; event_id and the rest follow from n."""
    facts = {
        "event_id": f"e{n}",
        "user_id": f"u{n % 17}",
        "item_id": f"i{n % 29}",
        "kind": Kind.RATING,
        "occurred_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n),
        "value": float(1 + n % 5),
    }
    return Interaction(**{**facts, **changes})


def raw_rows(log: Path) -> list[tuple[str, int, int]]:
    """(event_id, partition, offset) of every row of the log, nothing deduplicated."""
    files = FeedbackLog.open(log, create=False).snapshot().files
    if not files:
        return []
    query = "select event_id, kafka_partition, kafka_offset from read_parquet(?, hive_partitioning = true)"
    return duckdb.connect().execute(query, [files]).fetchall()


def command_line(
    kafka: KafkaSettings, home: Path, *arguments: str, **settings: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of an ``align3gr`` process that works on ``kafka`` and ``home``."""
    environment = {
        **os.environ,
        "ALIGN3GR_HOME": str(home),
        "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "ALIGN3GR_KAFKA__TOPIC": kafka.topic,
        "ALIGN3GR_KAFKA__DEAD_TOPIC": kafka.dead_topic,
        "ALIGN3GR_KAFKA__CONNECT_TIMEOUT_S": str(kafka.connect_timeout_s),
        "ALIGN3GR_INGEST__GROUP": kafka.topic,
        "ALIGN3GR_INGEST__SESSION_TIMEOUT_S": "1.2",
        "ALIGN3GR_INGEST__HEARTBEAT_S": "0.3",
        "ALIGN3GR_INGEST__LINGER_S": "0.2",
        **{f"ALIGN3GR_{name}": value for name, value in settings.items()},
    }
    return [sys.executable, "-m", "align3gr", *arguments], environment


def align3gr(
    kafka: KafkaSettings, home: Path, *arguments: str, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run an ``align3gr`` command to its end."""
    command, environment = command_line(kafka, home, *arguments, **settings)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
