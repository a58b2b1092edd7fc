"""From the topic into the log: what lands, what is refused, and what happens when things move."""

import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from features.batch import InteractionBatch, Record, Refused
from features.interactions import encode_interaction
from features.log import FeedbackLog
from features.settings import FeatureSettings
from ingest.broker import Broker, embedded_broker
from ingest.clock import utc_now
from ingest.dead_letters import DeadLetterBox, list_dead_letters, replay_dead_letters
from ingest.errors import OffsetsLost
from ingest.lag import lag
from ingest.landing import Landing
from ingest.producer import FeedbackProducer
from ingest.settings import IngestSettings, KafkaSettings
from ingest.topics import create_topics, identify
from ingest.worker import IngestWorker, WorkerReport
from tests.brokers import align3gr, command_line, interaction, raw_rows, topics_on
from tests.ingest.running import at_work, until

POISON = {
    "bad_json": b"{nope",
    "unknown_kind": encode_interaction(interaction(1)).replace(b'"rating"', b'"stare"'),
    "missing_field": b'{"event_id":"x","user_id":"u"}',
    "bad_field": encode_interaction(interaction(2)).replace(b'"value":3.0', b'"value":"three"'),
    "absurd_time": encode_interaction(interaction(3, occurred_at=datetime(2199, 1, 1, tzinfo=UTC))),
    "oversized": encode_interaction(interaction(4, text="x" * 5000)),
    "unknown_major_version": encode_interaction(interaction(5, schema_version="2.0")),
}
SMALL = FeatureSettings(max_event_bytes=4096)

running = partial(at_work, join_s=60.0)
wait_until = partial(until, timeout_s=40.0)


def worker(
    kafka: KafkaSettings, home: Path, features: FeatureSettings = SMALL, **changes: object
) -> IngestWorker:
    """A worker of a group of its own with short times."""
    ingest = IngestSettings(group=kafka.topic, session_timeout_s=1.2, heartbeat_s=0.3, linger_s=0.1)
    ingest = ingest.model_copy(update={"watermark_interval_s": 0.3, **changes})
    return IngestWorker(kafka, ingest, features, home / "log")


def send(kafka: KafkaSettings, numbers: range) -> None:
    with FeedbackProducer(kafka) as producer:
        for n in numbers:
            producer.send(interaction(n))
        assert producer.flush().failed == []


def event_ids(home: Path) -> list[str]:
    return sorted((row[0] for row in raw_rows(home / "log")), key=lambda name: int(name[1:]))


def expected(numbers: range) -> list[str]:
    return [f"e{n}" for n in numbers]


def test_every_event_lands_once_with_its_coordinates(kafka: KafkaSettings, tmp_path: Path) -> None:
    send(kafka, range(300))
    report = worker(kafka, tmp_path).run(until_caught_up=True)
    rows = raw_rows(tmp_path / "log")
    assert (report.rows, report.refused) == (300, 0)
    assert event_ids(tmp_path) == expected(range(300))
    assert len({(partition, offset) for _, partition, offset in rows}) == 300
    assert lag(kafka, tmp_path / "log").waiting == 0


def test_a_second_worker_goes_on_where_the_table_says(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    send(embedded_kafka, range(100))
    worker(embedded_kafka, tmp_path).run(until_caught_up=True)
    send(embedded_kafka, range(100, 150))
    report = worker(embedded_kafka, tmp_path).run(until_caught_up=True)
    assert report.rows == 50
    assert event_ids(tmp_path) == expected(range(150))


def test_the_log_decides_where_to_begin_and_not_kafkas_group(
    embedded_kafka: KafkaSettings, tmp_path: Path
) -> None:
    send(embedded_kafka, range(40))
    worker(embedded_kafka, tmp_path).run(until_caught_up=True)
    report = worker(embedded_kafka, tmp_path / "another").run(until_caught_up=True)
    assert report.rows == 40


def test_poison_never_stops_a_partition_and_is_kept_with_its_reason(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    raw = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    for n, value in enumerate([*POISON.values(), None]):
        raw.send(kafka.topic, key=f"k{n}".encode(), value=value)
        raw.send(kafka.topic, key=f"k{n}".encode(), value=encode_interaction(interaction(100 + n)))
    raw.close()
    report = worker(kafka, tmp_path).run(until_caught_up=True)
    assert event_ids(tmp_path) == expected(range(100, 108))
    assert report.refused == 8
    assert dict(report.refused_by_reason) == dict.fromkeys(POISON, 1) | {"bad_json": 2}
    letters = list_dead_letters(kafka)
    assert {one.reason: one.value for one in letters if one.value} == POISON
    places = {(partition, offset) for _, partition, offset in raw_rows(tmp_path / "log")}
    assert places.isdisjoint((one.partition, one.offset) for one in letters)
    assert lag(kafka, tmp_path / "log").waiting == 0


def test_a_topic_that_ends_in_poison_is_caught_up(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    raw = KafkaProducer(bootstrap_servers=embedded_kafka.bootstrap_servers)
    raw.send(embedded_kafka.topic, value=b"{nope", partition=0)
    raw.close()
    assert worker(embedded_kafka, tmp_path).run(until_caught_up=True).refused == 1
    assert worker(embedded_kafka, tmp_path).run(until_caught_up=True).refused == 0


def test_dead_letters_come_back_after_a_fix_and_only_once(kafka: KafkaSettings, tmp_path: Path) -> None:
    raw = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    for reason in ("oversized", "bad_json"):
        raw.send(kafka.topic, value=POISON[reason])
    raw.close()
    worker(kafka, tmp_path).run(until_caught_up=True)
    still = replay_dead_letters(kafka, SMALL, now=utc_now())
    assert (still.replayed, still.refused) == (0, {"oversized": 1, "bad_json": 1})
    fixed = FeatureSettings()
    done = replay_dead_letters(kafka, fixed, now=utc_now())
    assert (done.replayed, done.refused, done.undelivered) == (1, {"bad_json": 1}, [])
    worker(kafka, tmp_path, fixed).run(until_caught_up=True)
    assert event_ids(tmp_path) == ["e4"]
    assert [one.reason for one in list_dead_letters(kafka)] == ["bad_json"]
    assert replay_dead_letters(kafka, fixed, now=utc_now()).replayed == 0


def test_a_letter_published_twice_is_listed_once(embedded_kafka: KafkaSettings) -> None:
    box = DeadLetterBox(embedded_kafka)
    refused = Refused(Record(b"{nope", 1, 7, 0), "bad_json", "bad_json: words")
    for _ in range(2):
        box.publish([refused], identify(embedded_kafka))
    box.close()
    (letter,) = list_dead_letters(embedded_kafka)
    assert (letter.partition, letter.offset, letter.reason, letter.value) == (1, 7, "bad_json", b"{nope")


def test_two_workers_share_the_partitions_and_land_everything_once(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    first, second = worker(kafka, tmp_path), worker(kafka, tmp_path)
    with running(first) as first_ended:
        send(kafka, range(200))
        wait_until(lambda: first.report.rows)
        with running(second) as second_ended:
            wait_until(lambda: second.report.claims)
            send(kafka, range(200, 400))
            wait_until(lambda: lag(kafka, tmp_path / "log").waiting == 0)
    assert event_ids(tmp_path) == expected(range(400))
    assert all(isinstance(one, WorkerReport) for one in first_ended + second_ended)
    assert second.report.rows > 0


def test_a_topic_made_anew_under_a_running_worker_lands_from_its_zero(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    send(kafka, range(50))
    one = worker(kafka, tmp_path)
    with running(one) as ended:
        wait_until(lambda: one.report.rows == 50)
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.delete_topics([kafka.topic])
        create_topics(kafka)
        send(kafka, range(50, 80))
        wait_until(lambda: one.report.rows == 80)
    assert isinstance(ended[0], WorkerReport)
    assert event_ids(tmp_path) == expected(range(80))


def test_the_watermark_of_idle_partitions_follows_the_clock(kafka: KafkaSettings, tmp_path: Path) -> None:
    log = FeedbackLog.open(tmp_path / "log")
    begun = utc_now()
    with running(worker(kafka, tmp_path)):
        wait_until(lambda: (at := log.snapshot().watermark) is not None and at > begun)
    at = log.snapshot().watermark
    assert at is not None
    assert at < utc_now()


def test_the_watermark_stands_still_while_the_broker_is_away(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "broker") as node:
        kafka = topics_on(node, connect_timeout_s=0.5)
        log = FeedbackLog.open(tmp_path / "log")
        with running(worker(kafka, tmp_path)):
            wait_until(lambda: log.snapshot().watermark)
            node.kill()
            gone = utc_now()
            time.sleep(4.0)
            at = log.snapshot().watermark
    assert at is not None
    assert at < gone + timedelta(milliseconds=100)


@pytest.mark.kafka
def test_partitions_added_under_a_running_worker_land_too(real_kafka: Broker, tmp_path: Path) -> None:
    kafka = topics_on(real_kafka)
    send(kafka, range(50))
    one = worker(kafka, tmp_path)
    with running(one) as ended:
        wait_until(lambda: one.report.rows == 50)
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.create_partitions({kafka.topic: 4})
        wait_until(lambda: identify(kafka).partitions == (0, 1, 2, 3))
        send(kafka, range(50, 150))
        wait_until(lambda: one.report.rows == 150)
    assert isinstance(ended[0], WorkerReport)
    assert {partition for _, partition, _ in raw_rows(tmp_path / "log")} == {0, 1, 2, 3}


def test_a_memory_only_broker_started_again_under_a_worker_is_another_topic(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "broker") as node:
        kafka = topics_on(node)
        send(kafka, range(30))
        one = worker(kafka, tmp_path)
        with running(one) as ended:
            wait_until(lambda: one.report.rows == 30)
            node.kill()
            node.start()
            create_topics(kafka)
            send(kafka, range(30, 50))
            wait_until(lambda: one.report.rows == 50)
    assert isinstance(ended[0], WorkerReport)
    assert event_ids(tmp_path) == expected(range(50))


@pytest.mark.kafka
def test_events_that_left_the_topic_before_they_landed_are_said_and_not_skipped(
    real_kafka: Broker, tmp_path: Path
) -> None:
    kafka = topics_on(real_kafka)
    send(kafka, range(60))
    worker(kafka, tmp_path).run(until_caught_up=True)
    send(kafka, range(60, 120))
    _delete_records_before(kafka, {p.partition: p.end - 5 for p in lag(kafka, tmp_path / "log").partitions})
    with pytest.raises(OffsetsLost, match=r"left the topic before they landed.*lost_offsets"):
        worker(kafka, tmp_path).run(until_caught_up=True)
    report = worker(kafka, tmp_path, lost_offsets="skip").run(until_caught_up=True)
    assert report.rows == 10


def _delete_records_before(kafka: KafkaSettings, offsets: dict[int, int]) -> None:
    from kafka import TopicPartition

    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(kafka.topic, p): offset for p, offset in offsets.items()})


def test_a_topic_that_ends_before_what_has_landed_is_said_and_no_silent_stall(
    kafka: KafkaSettings, tmp_path: Path
) -> None:
    identity = identify(kafka)
    batch = InteractionBatch.of(SMALL)
    batch.add([Record(encode_interaction(interaction(1)), 0, 500, 0)], now=utc_now())
    landing = Landing(tmp_path / "log", SMALL, DeadLetterBox(kafka), utc_now)
    landing.claim(identity, [0])
    landing.land(batch, [])
    send(kafka, range(20))
    one = worker(kafka, tmp_path)
    with running(one) as ended:
        wait_until(lambda: ended)
    assert isinstance(ended[0], OffsetsLost)
    assert "the log has landed events up to 500" in str(ended[0])


def test_a_full_disk_is_said_and_nothing_is_lost(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    send(embedded_kafka, range(3000))
    command, environment = command_line(embedded_kafka, tmp_path, "ingest", "--until-caught-up")
    # No file of the process may pass 6 KiB: the table can be made, no data file can be written.
    small = ["bash", "-c", 'ulimit -f 6; exec "$@"', "small", *command]
    done = subprocess.run(small, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr.splitlines()[-1]
    assert raw_rows(tmp_path / "log") == []
    assert align3gr(embedded_kafka, tmp_path, "ingest", "--until-caught-up").returncode == 0
    assert event_ids(tmp_path) == expected(range(3000))


def test_what_a_worker_holds_lands_when_it_is_told_to_stop(
    embedded_kafka: KafkaSettings, tmp_path: Path
) -> None:
    send(embedded_kafka, range(200))
    one = worker(embedded_kafka, tmp_path, linger_s=60.0)
    with running(one):
        wait_until(lambda: len(one._batch) == 200)
        assert one.report.rows == 0
    assert one.report.rows == 200
    assert event_ids(tmp_path) == expected(range(200))


def test_an_ingest_process_ends_in_order_on_sigterm(kafka: KafkaSettings, tmp_path: Path) -> None:
    send(kafka, range(200))
    command, environment = command_line(kafka, tmp_path, "ingest", "--json")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        # The folder is there a moment before the table is.
        table = tmp_path / "log" / "_delta_log" / "00000000000000000000.json"
        wait_until(lambda: table.exists() and len(raw_rows(tmp_path / "log")) == 200)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["rows"] == 200


@pytest.mark.slow
def test_until_caught_up_ends_with_the_rows_of_several_workers(
    embedded_kafka: KafkaSettings, tmp_path: Path
) -> None:
    send(embedded_kafka, range(100))
    done = align3gr(embedded_kafka, tmp_path, "ingest", "--until-caught-up", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert event_ids(tmp_path) == expected(range(100))


def test_an_ingest_worker_imports_neither_torch_nor_feast_nor_mlflow() -> None:
    program = (
        "import sys, ingest.worker, align3gr.commands.ingest, align3gr.__main__, align3gr.settings; "
        "print([name for name in ('torch', 'feast', 'mlflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}, 1, "no Kafka broker answers at 127.0.0.1:1"),
        ({"KAFKA__TOPIC": "nowhere"}, 2, "topic nowhere does not exist"),
        ({"KAFKA__DEAD_TOPIC": "nowhere.dead"}, 2, "topic nowhere.dead does not exist"),
        ({"INGEST__BATCH_ROWS": "0"}, 2, "ingest.batch_rows"),
    ],
)
def test_bad_input_is_one_line_and_lands_nothing(
    embedded_kafka: KafkaSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, str],
    code: int,
    words: str,
) -> None:
    settings = {"KAFKA__CONNECT_TIMEOUT_S": "0.5", **changes}
    assert here(monkeypatch, embedded_kafka, tmp_path, "ingest", "--until-caught-up", **settings) == code
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1, errors
    assert words in errors
    assert not (tmp_path / "log").exists()


def test_dead_letter_commands_show_and_send_again(
    embedded_kafka: KafkaSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    raw = KafkaProducer(bootstrap_servers=embedded_kafka.bootstrap_servers)
    raw.send(embedded_kafka.topic, value=POISON["oversized"])
    raw.close()
    worker(embedded_kafka, tmp_path).run(until_caught_up=True)
    assert here(monkeypatch, embedded_kafka, tmp_path, "dead-letters", "list", "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["waiting"], facts["by_reason"]) == (1, {"oversized": 1})
    assert here(monkeypatch, embedded_kafka, tmp_path, "dead-letters", "replay", "--json") == 0
    assert json.loads(capfd.readouterr().out)["replayed"] == 1
    assert here(monkeypatch, embedded_kafka, tmp_path, "dead-letters", "list") == 0
    assert "no dead letters" in capfd.readouterr().out


def here(
    monkeypatch: pytest.MonkeyPatch, kafka: KafkaSettings, home: Path, *arguments: str, **settings: str
) -> int:
    """Run an ``align3gr`` command in this process, which saves its start; its exit code."""
    from align3gr.__main__ import app
    from align3gr.console import run

    _, environment = command_line(kafka, home, **settings)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return run(app, list(arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
