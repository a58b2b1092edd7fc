"""The exactly-once protocol at the log, without Kafka."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from features.batch import InteractionBatch, Record
from features.interactions import encode_interaction
from features.log import FeedbackLog, LogConflict, LogUnwritable
from features.settings import FeatureSettings
from ingest.dead_letters import DeadLetterBox
from ingest.landing import Landing
from ingest.settings import KafkaSettings
from ingest.topics import TopicIdentity
from tests.brokers import interaction, raw_rows

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
TOPIC = TopicIdentity("cluster", "interactions", "topic-id", (0, 1))


def landing(home: Path) -> Landing:
    return Landing(home / "log", FeatureSettings(), DeadLetterBox(KafkaSettings()), lambda: NOW)


def batch(partition: int, offsets: range, arrived_ms: int = NOW_MS) -> InteractionBatch:
    records = [
        Record(encode_interaction(interaction(1000 * partition + n)), partition, n, arrived_ms)
        for n in offsets
    ]
    made = InteractionBatch.of(FeatureSettings())
    assert made.add(records, now=NOW) == []
    return made


def test_rows_and_offsets_land_together(tmp_path: Path) -> None:
    worker = landing(tmp_path)
    assert worker.claim(TOPIC, [0, 1]) == {0: None, 1: None}
    landed = worker.land(batch(0, range(10)), [])
    assert (landed.rows, landed.next_offsets) == (10, {0: 10})
    assert landing(tmp_path).claim(TOPIC, [0, 1]) == {0: 9, 1: None}
    assert len(raw_rows(tmp_path / "log")) == 10


def test_a_worker_that_lost_its_partition_cannot_land(tmp_path: Path) -> None:
    first, second = landing(tmp_path), landing(tmp_path)
    first.claim(TOPIC, [0])
    second.claim(TOPIC, [0])
    second.land(batch(0, range(10)), [])
    with pytest.raises(LogConflict):
        first.land(batch(0, range(5)), [])
    assert len(raw_rows(tmp_path / "log")) == 10


def test_nor_can_it_after_an_append_of_another_partition_moved_its_handle(tmp_path: Path) -> None:
    """Step 3: the compare-and-set against the handle's snapshot is disarmed by the worker's own append."""
    earlier = landing(tmp_path)
    earlier.claim(TOPIC, [0, 1])
    earlier.advance([0, 1], NOW_MS - 60_000)
    first, second = landing(tmp_path), landing(tmp_path)
    first.claim(TOPIC, [0, 1])
    second.claim(TOPIC, [0])
    second.land(batch(0, range(10)), [])
    first.land(batch(1, range(10)), [])
    with pytest.raises(LogConflict):
        first.land(batch(0, range(5)), [])
    assert len(raw_rows(tmp_path / "log")) == 20
    assert landing(tmp_path).claim(TOPIC, [0])[0] == 9


def test_after_a_batch_that_did_not_land_no_later_one_is_taken(tmp_path: Path) -> None:
    first, second = landing(tmp_path), landing(tmp_path)
    first.claim(TOPIC, [0])
    second.claim(TOPIC, [0])
    second.land(batch(0, range(3)), [])
    with pytest.raises(LogConflict):
        first.land(batch(0, range(10)), [])
    with pytest.raises(LogConflict):
        first.land(batch(0, range(10, 20)), [])
    with pytest.raises(LogConflict):
        first.advance([0], NOW_MS + 1)
    assert first.claim(TOPIC, [0]) == {0: 2}
    assert first.land(batch(0, range(3, 10)), []).rows == 7
    assert sorted(offset for _, _, offset in raw_rows(tmp_path / "log")) == list(range(10))


def test_a_topic_made_anew_starts_at_its_own_zero(tmp_path: Path) -> None:
    worker = landing(tmp_path)
    worker.claim(TOPIC, [0])
    worker.land(batch(0, range(10)), [])
    anew = TopicIdentity("cluster", "interactions", "another-id", (0, 1))
    assert worker.claim(anew, [0]) == {0: None}
    worker.land(batch(0, range(4)), [])
    assert worker.claim(anew, [0]) == {0: 3}


def test_the_watermark_follows_arrivals_and_waits_for_every_partition(tmp_path: Path) -> None:
    worker = landing(tmp_path)
    worker.claim(TOPIC, [0, 1])
    worker.land(batch(0, range(2), NOW_MS - 5000), [])
    log = FeedbackLog.open(tmp_path / "log")
    assert log.snapshot().watermark is None
    worker.advance([1], NOW_MS - 9000)
    assert log.snapshot().watermark == datetime.fromtimestamp((NOW_MS - 9000) / 1000, UTC)
    worker.advance([1], NOW_MS)
    assert log.snapshot().watermark == datetime.fromtimestamp((NOW_MS - 5000) / 1000, UTC)


def test_the_watermark_neither_goes_back_nor_ahead_of_the_clock(tmp_path: Path) -> None:
    worker = landing(tmp_path)
    worker.claim(TOPIC, [0, 1])
    worker.advance([0, 1], NOW_MS - 1000)
    worker.land(batch(0, range(2), NOW_MS - 60_000), [])
    log = FeedbackLog.open(tmp_path / "log")
    assert log.snapshot().watermark == datetime.fromtimestamp((NOW_MS - 1000) / 1000, UTC)
    worker.land(batch(0, range(2, 4), NOW_MS + 86_400_000), [])
    worker.advance([1], NOW_MS)
    assert log.snapshot().watermark == NOW


def test_a_stale_worker_cannot_advance_the_watermark(tmp_path: Path) -> None:
    first, second = landing(tmp_path), landing(tmp_path)
    first.claim(TOPIC, [0])
    second.claim(TOPIC, [0])
    second.land(batch(0, range(2), NOW_MS - 5000), [])
    with pytest.raises(LogConflict):
        first.advance([0], NOW_MS)
    assert len(raw_rows(tmp_path / "log")) == 2


def test_a_log_that_cannot_be_opened_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("not a folder")
    with pytest.raises(LogUnwritable) as caught:
        landing(tmp_path).claim(TOPIC, [0])
    assert "\n" not in str(caught.value)
