"""The recorder: nobody waits for Kafka, and nothing that was accepted is lost while it is away."""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaConsumer

from align3gr.server.events import EventRecorder, NotRecorded
from align3gr.server.metrics import ServerMetrics
from features.interactions import Interaction, Kind
from ingest.broker import Broker, embedded_broker, settings_for
from ingest.producer import FeedbackProducer
from ingest.settings import KafkaSettings
from ingest.topics import create_topics
from tests.brokers import topics_on


def served(number: int) -> Interaction:
    return Interaction(
        event_id=f"s{number}",
        user_id=f"u{number % 7}",
        item_id="i",
        kind=Kind.SERVED,
        occurred_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def recorder_to(kafka: KafkaSettings, *, queue: int = 10_000, timeout: float = 5.0) -> EventRecorder:
    return EventRecorder(
        lambda: FeedbackProducer(kafka), ServerMetrics(), queue=queue, timeout_seconds=timeout
    )


def stored(kafka: KafkaSettings) -> list[str]:
    consumer = KafkaConsumer(
        kafka.topic,
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=3000,
    )
    try:
        return [json.loads(record.value)["event_id"] for record in consumer]
    finally:
        consumer.close()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_is_recorded_before_the_broker_is_there_arrives_when_it_is(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "first") as broker:
        port = broker.port
    kafka = settings_for(broker, KafkaSettings(connect_timeout_s=0.5, delivery_timeout_s=5))
    recorder = recorder_to(kafka)
    recorder.start()
    recorder.record([served(number) for number in range(20)])
    wait_for(lambda: recorder.error is not None)
    with Broker("embedded", tmp_path / "second", port=port):
        create_topics(kafka)
        posted = recorder.publish([served(100)])
        assert posted.result(timeout=30) == 1
        assert recorder.stop(10) == 0
        assert sorted(stored(kafka)) == sorted([f"s{number}" for number in range(20)] + ["s100"])
    assert recorder.error is None


def test_a_full_queue_drops_and_counts_and_never_waits(embedded: Broker) -> None:
    metrics = ServerMetrics()
    recorder = EventRecorder(
        lambda: FeedbackProducer(topics_on(embedded)), metrics, queue=5, timeout_seconds=5
    )  # not started: nothing is taken from the queue
    recorder.record([served(number) for number in range(8)])
    assert recorder.waiting == 5
    assert b'align3gr_events_total{outcome="dropped"} 3.0' in metrics.text()


def test_feedback_that_no_broker_acknowledges_in_time_is_refused() -> None:
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:9", connect_timeout_s=0.2)
    recorder = recorder_to(kafka, timeout=0.5)
    recorder.start()
    with pytest.raises(NotRecorded, match="send it again with the same event_ids"):
        recorder.publish([served(1)]).result(timeout=20)
    recorder.stop(0.1)


@pytest.mark.slow
@pytest.mark.kafka
def test_a_killed_broker_loses_nothing_that_was_recorded(real_kafka: Broker, tmp_path: Path) -> None:
    from ingest.broker import kafka_broker

    with kafka_broker(tmp_path / "killed") as broker:
        kafka = topics_on(broker)
        recorder = recorder_to(kafka)
        recorder.start()
        for number in range(2_000):
            recorder.record([served(number)])
            if number in (500, 1200):
                broker.kill()
            if number in (800, 1500):
                broker.start()
            time.sleep(0.002)
        assert recorder.stop(60) == 0
        assert set(stored(kafka)) == {f"s{number}" for number in range(2_000)}
