"""Brokers that the product starts, and what exists on them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ingest.broker import Broker, embedded_broker, kafka_broker, settings_for
from ingest.errors import BrokerUnreachable, IngestError, PortTaken, TopicMissing
from ingest.producer import FeedbackProducer
from ingest.settings import KafkaSettings
from ingest.topics import create_topics, identify, reach
from tests.brokers import interaction


def test_a_broker_answers_with_the_cluster_id_it_was_given(broker: Broker, kafka: KafkaSettings) -> None:
    assert identify(kafka).cluster == broker.cluster_id
    assert identify(kafka).partitions == (0, 1)


def test_a_port_that_something_else_listens_on_is_refused(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"port {port} is taken"):
            embedded_broker(tmp_path, port).start()
    assert not (tmp_path / "broker.json").exists()


def test_the_port_of_another_broker_is_refused(embedded: Broker, tmp_path: Path) -> None:
    with pytest.raises(PortTaken):
        embedded_broker(tmp_path, embedded.port).start()
    assert embedded.running


def test_an_embedded_broker_started_again_is_another_cluster_without_topics(tmp_path: Path) -> None:
    with embedded_broker(tmp_path) as node:
        kafka = settings_for(node)
        create_topics(kafka)
        before = identify(kafka)
        node.kill()
        node.start()
        assert not node.keeps_data
        with pytest.raises(TopicMissing):
            identify(kafka)
        create_topics(kafka)
        assert identify(kafka).life != before.life


@pytest.mark.kafka
@pytest.mark.slow
def test_a_killed_kafka_comes_back_with_its_topics(real_kafka: Broker, tmp_path: Path) -> None:
    with kafka_broker(tmp_path) as node:
        kafka = settings_for(node)
        create_topics(kafka)
        with FeedbackProducer(kafka) as producer:
            producer.send(interaction(1))
        before = identify(kafka)
        node.kill()
        node.start()
        assert identify(kafka) == before
        assert sum(at.end for at in reach(kafka).values()) == 1


def test_a_broker_that_a_killed_parent_left_behind_is_ended(tmp_path: Path) -> None:
    orphan = embedded_broker(tmp_path).start()
    process = orphan._process
    assert process is not None
    with embedded_broker(tmp_path) as node:
        assert process.wait(10) is not None
        assert node.cluster_id != orphan.cluster_id


def test_a_topic_made_anew_has_another_life(embedded_kafka: KafkaSettings) -> None:
    from kafka import KafkaAdminClient

    before = identify(embedded_kafka)
    with KafkaAdminClient(bootstrap_servers=embedded_kafka.bootstrap_servers) as admin:
        admin.delete_topics([embedded_kafka.topic])
    create_topics(embedded_kafka)
    assert identify(embedded_kafka).cluster == before.cluster
    assert identify(embedded_kafka).life != before.life


def test_a_missing_topic_is_named_with_the_command_that_makes_it(embedded: Broker) -> None:
    with pytest.raises(TopicMissing, match=r"topic nowhere does not exist .*align3gr broker topics"):
        identify(settings_for(embedded), "nowhere")


def test_an_unreachable_broker_is_named_with_the_way_out() -> None:
    with pytest.raises(BrokerUnreachable, match=r"no Kafka broker answers at 127.0.0.1:1 .*align3gr broker"):
        identify(KafkaSettings(bootstrap_servers="127.0.0.1:1", connect_timeout_s=0.5))


def test_an_option_that_the_client_does_not_know_is_refused(embedded: Broker) -> None:
    kafka = settings_for(embedded, KafkaSettings(client_options={"no_such_option": 1}))
    with pytest.raises(IngestError, match="no_such_option"):
        identify(kafka)


def test_the_end_of_a_partition_counts_every_record_of_the_last_batch(kafka: KafkaSettings) -> None:
    with FeedbackProducer(kafka) as producer:
        for n in range(100):
            producer.send(interaction(n))
    assert sum(at.end for at in reach(kafka).values()) == 100


def test_security_settings_reach_the_client_as_they_are() -> None:
    kafka = KafkaSettings(
        bootstrap_servers="a:1, b:2",
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_plain_username="who",
        sasl_plain_password="what",
        ssl_cafile="ca.pem",
        client_options={"client_id": "me"},
    )
    options = kafka.connection()
    assert options["bootstrap_servers"] == ["a:1", "b:2"]
    assert options["security_protocol"] == "SASL_SSL"
    assert (options["sasl_mechanism"], options["sasl_plain_username"]) == ("SCRAM-SHA-512", "who")
    assert (options["sasl_plain_password"], options["ssl_cafile"]) == ("what", "ca.pem")
    assert options["client_id"] == "me"
    assert "what" not in repr(kafka)


@pytest.mark.parametrize("ends_by", [signal.SIGINT, signal.SIGTERM])
def test_the_broker_command_runs_until_told_to_stop(tmp_path: Path, ends_by: int) -> None:
    command = [sys.executable, "-m", "align3gr", "broker", "--kind", "embedded", "--port", "0", "--json"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "ALIGN3GR_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        kafka = KafkaSettings(bootstrap_servers=facts["bootstrap_servers"])
        assert identify(kafka).cluster == facts["cluster"]
        assert facts["keeps_data"] is False
        process.send_signal(ends_by)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "memory only" in errors
    with pytest.raises(BrokerUnreachable):
        identify(kafka.model_copy(update={"connect_timeout_s": 0.3}))


def test_the_broker_command_says_when_its_port_is_taken(embedded: Broker, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "align3gr", "broker", "--kind", "embedded", "--port", str(embedded.port)],
        env={**os.environ, "ALIGN3GR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port {embedded.port} is taken" in done.stderr
    assert time.monotonic() - begun < 30
