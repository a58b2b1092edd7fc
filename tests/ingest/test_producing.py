"""FeedbackProducer: every event is acknowledged or reported."""

from pathlib import Path

import pytest

from features.interactions import decode_interaction
from ingest.broker import Broker, embedded_broker
from ingest.clock import utc_now
from ingest.errors import TopicMissing
from ingest.producer import FeedbackProducer
from ingest.settings import KafkaSettings
from ingest.topics import read_all
from tests.brokers import interaction, topics_on


def test_what_was_sent_is_in_the_topic_keyed_by_user_and_in_order(kafka: KafkaSettings) -> None:
    events = [interaction(n) for n in range(500)]
    with FeedbackProducer(kafka) as producer:
        for event in events:
            producer.send(event)
        report = producer.flush()
    assert (report.acknowledged, report.failed) == (500, [])
    records = list(read_all(kafka, kafka.topic))
    stored = [decode_interaction(record.value, now=utc_now()) for record in records]
    assert all(record.key == event.user_id.encode() for record, event in zip(records, stored, strict=True))
    for user in {event.user_id for event in events}:
        assert [e for e in stored if e.user_id == user] == [e for e in events if e.user_id == user]


def test_leaving_the_context_sends_what_is_queued(embedded_kafka: KafkaSettings) -> None:
    with FeedbackProducer(embedded_kafka) as producer:
        producer.send(interaction(1))
    assert len(list(read_all(embedded_kafka, embedded_kafka.topic))) == 1


def test_an_event_too_large_for_a_message_is_reported_and_the_others_go(
    embedded_kafka: KafkaSettings,
) -> None:
    with FeedbackProducer(embedded_kafka) as producer:
        producer.send(interaction(1))
        producer.send(interaction(2, text="x" * 1_500_000))
        producer.send(interaction(3))
        report = producer.flush()
    assert report.acknowledged == 2
    assert [one.event_id for one in report.failed] == ["e2"]
    assert "MessageSizeTooLarge" in report.failed[0].reason


def test_events_that_no_broker_acknowledged_are_reported_with_a_reason(tmp_path: Path) -> None:
    with embedded_broker(tmp_path) as node:
        kafka = topics_on(node, delivery_timeout_s=2.0)
        producer = FeedbackProducer(kafka)
        producer.send(interaction(1))
        assert producer.flush().acknowledged == 1
        node.kill()
        for n in (2, 3):
            producer.send(interaction(n))
        report = producer.close()
    assert report.acknowledged == 1
    assert [one.event_id for one in report.failed] == ["e2", "e3"]
    assert all(one.reason for one in report.failed)


def test_a_producer_for_a_missing_topic_is_not_made(embedded: Broker) -> None:
    kafka = KafkaSettings(bootstrap_servers=embedded.bootstrap_servers, topic="nowhere")
    with pytest.raises(TopicMissing):
        FeedbackProducer(kafka)


@pytest.mark.kafka
@pytest.mark.slow
def test_through_a_broker_kill_every_acknowledged_event_is_stored(real_kafka: Broker, tmp_path: Path) -> None:
    from ingest.broker import kafka_broker

    with kafka_broker(tmp_path) as node:
        kafka = topics_on(node, delivery_timeout_s=30)
        with FeedbackProducer(kafka) as producer:
            for n in range(20_000):
                producer.send(interaction(n))
                if n == 10_000:
                    node.kill()
                    node.start()
            report = producer.flush()
        stored = {decode_interaction(r.value, now=utc_now()).event_id for r in read_all(kafka, kafka.topic)}
    reported = {one.event_id for one in report.failed}
    assert report.acknowledged + len(reported) == 20_000
    assert {f"e{n}" for n in range(20_000)} - reported <= stored
