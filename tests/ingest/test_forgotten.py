"""Who was forgotten is not landed again, and their dead letters are gone."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from align3gr.forgetting import forget
from align3gr.settings import Settings
from features.errors import FeaturesError
from features.log import FeedbackLog
from features.settings import FeatureSettings
from features.tombstones import bury
from ingest.dead_letters import forget_letters, list_dead_letters
from ingest.producer import FeedbackProducer
from ingest.settings import IngestSettings, KafkaSettings
from ingest.worker import IngestWorker
from tests.brokers import interaction, raw_rows

NOW = datetime(2026, 5, 1, tzinfo=UTC)
EVENTS = [interaction(number) for number in range(68)]
"""Of 17 users, u0 to u16, four each."""


def send(kafka: KafkaSettings, *more: tuple[str, str, bytes]) -> None:
    with FeedbackProducer(kafka) as producer:
        for event in EVENTS:
            producer.send(event)
        for event_id, user_id, raw in more:
            producer.send_encoded(event_id, user_id, raw, [])
        assert not producer.flush().failed


def landed(kafka: KafkaSettings, home: Path):  # type: ignore[no-untyped-def]
    ingest = IngestSettings(group=kafka.topic, session_timeout_s=1.2, heartbeat_s=0.3, linger_s=0.1)
    worker = IngestWorker(kafka, ingest, FeatureSettings(), home / "log")
    return worker.run(until_caught_up=True)


def test_a_replay_lands_everybody_but_who_was_forgotten(
    embedded_kafka: KafkaSettings, tmp_path: Path
) -> None:
    poison = json.dumps({"user_id": "u3", "kind": "?"}).encode()
    send(embedded_kafka, ("bad-1", "u3", poison), ("bad-2", "u4", poison.replace(b"u3", b"u4")))
    landed(embedded_kafka, tmp_path)
    assert len(raw_rows(tmp_path / "log")) == 68
    assert len(list_dead_letters(embedded_kafka)) == 2

    settings = Settings(home=tmp_path, kafka=embedded_kafka)
    done = forget(settings, "u3", clock=lambda: NOW)
    assert (done.rows, done.letters, done.problem) == (4, 1, None)
    (letter,) = list_dead_letters(embedded_kafka)
    assert b"u4" in letter.value

    send(embedded_kafka, ("bad-3", "u3", poison))
    report = landed(embedded_kafka, tmp_path)
    assert (report.rows, report.forgotten, report.refused) == (64, 5, 0)
    assert len(raw_rows(tmp_path / "log")) == 2 * 64
    assert len(list_dead_letters(embedded_kafka)) == 1
    again = landed(embedded_kafka, tmp_path)  # the offsets of what was left out are passed too
    assert (again.rows, again.forgotten) == (0, 0)
    assert forget_letters(embedded_kafka, "u3") == 0


def test_a_batch_of_nobody_else_lands_as_its_offsets(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    FeedbackLog.open(tmp_path / "log")
    for number in range(17):
        bury(tmp_path / "log", f"u{number}", NOW)
    send(embedded_kafka)
    report = landed(embedded_kafka, tmp_path)
    assert (report.rows, report.forgotten) == (0, 68)
    assert raw_rows(tmp_path / "log") == []
    assert landed(embedded_kafka, tmp_path).forgotten == 0


def test_tombstones_that_cannot_be_read_stop_ingest(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    bury(tmp_path / "log", "u1", NOW)
    (tmp_path / "log" / "_forgotten" / "tombstones.json").write_text("{")
    send(embedded_kafka)
    with pytest.raises(FeaturesError, match="brings back who was forgotten"):
        landed(embedded_kafka, tmp_path)
    assert raw_rows(tmp_path / "log") == []
