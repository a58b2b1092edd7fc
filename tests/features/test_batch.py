"""From Kafka records to the columns of the log."""

import json
from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from features import LevelRules
from features.batch import InteractionBatch, Record
from features.log import LOG_SCHEMA, FeedbackLog
from features.requests import sign_request
from features.settings import FeatureSettings

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
KEY = b"a key"
REASONS = {
    "bad_json", "unknown_kind", "missing_field", "bad_field", "absurd_time", "oversized",
    "unknown_major_version",
}  # fmt: skip


def record(offset: int, partition: int = 0, **fields: object) -> Record:
    plain = {
        "event_id": f"e{offset}", "user_id": "u", "item_id": "i", "kind": "like",
        "occurred_at": "2026-04-30T10:00:00.000001+02:00",
    }  # fmt: skip
    return Record(json.dumps(plain | fields).encode(), partition, offset, 1_777_000_000_123 + offset)


def test_rows_are_what_happened_with_level_and_coordinates() -> None:
    batch = InteractionBatch(LevelRules(), signing_key=KEY)
    signed = sign_request(KEY, "r1", "u")
    refused = batch.add(
        [
            record(5, kind="rating", value=2.5, source="movielens", request_id=signed, position=2, mood="é"),
            record(
                6, partition=3, kind="served", request_id="forged.00", propensity=0.25, policy_version="v2"
            ),
        ],
        now=NOW,
    )
    table = batch.table(NOW)
    assert not refused
    assert table.schema == LOG_SCHEMA
    first, second = table.to_pylist()
    assert first["level"] == -1
    assert first["rules"] == LevelRules().hash
    assert first["occurred_at"] == datetime(2026, 4, 30, 8, 0, 0, 1, tzinfo=UTC)
    assert json.loads(first["extra"]) == {"mood": "é"}
    assert (first["signed"], first["position"], first["kafka_partition"], first["kafka_offset"]) == (
        True,
        2,
        0,
        5,
    )
    assert first["arrived_at"] == datetime.fromtimestamp(1_777_000_000.128, UTC)
    assert (first["landed_at"], first["landed_on"]) == (NOW, NOW.date())
    assert (second["level"], second["signed"], second["extra"]) == (None, False, None)
    assert (second["kind"], second["propensity"], second["policy_version"]) == ("served", 0.25, "v2")


def test_signatures_are_unknown_without_a_key_or_a_request() -> None:
    with_key = InteractionBatch(LevelRules(), signing_key=KEY)
    with_key.add([record(0)], now=NOW)
    without = InteractionBatch(LevelRules())
    without.add([record(0, request_id="r")], now=NOW)
    assert with_key.table(NOW)["signed"].to_pylist() == without.table(NOW)["signed"].to_pylist() == [None]


def test_poison_is_handed_back_and_does_not_stop_the_partition() -> None:
    batch = InteractionBatch(LevelRules())
    poison = Record(b"{", 0, 1, 5)
    tombstone = Record(None, 0, 3, 7)
    refused = batch.add([record(0), poison, record(2), tombstone], now=NOW)
    assert [(bad.record, bad.reason) for bad in refused] == [(poison, "bad_json"), (tombstone, "bad_json")]
    assert batch.table(NOW)["kafka_offset"].to_pylist() == [0, 2]
    assert batch.last_offsets() == {0: 3}
    assert batch.last_arrivals() == {0: 7}


def test_a_revoked_partition_leaves_the_batch() -> None:
    batch = InteractionBatch(LevelRules())
    batch.add([record(0), record(9, partition=1), record(1)], now=NOW)
    assert batch.discard(0) == 2
    assert len(batch) == 1
    assert batch.table(NOW)["kafka_offset"].to_pylist() == [9]
    assert batch.last_offsets() == {1: 9}
    batch.clear()
    assert (len(batch), batch.last_offsets(), batch.table(NOW).num_rows) == (0, {}, 0)


def test_limits_come_from_the_settings_and_the_table_fits_the_log(tmp_path: Path) -> None:
    batch = InteractionBatch.of(FeatureSettings(max_event_bytes=256))
    refused = batch.add([record(0), record(1, text="x" * 300)], now=NOW)
    assert [bad.reason for bad in refused] == ["oversized"]
    log = FeedbackLog.open(tmp_path / "log")
    assert log.append(batch.table(NOW), {}) == 1


wire_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=300),
    st.lists(st.none(), max_size=2),
    st.sampled_from(["like", "dwell", "2026-04-30T10:00:00Z", "1.0", "1.5", "2.0", "a\nb"]),
    st.sampled_from(["\x7f", 1e308, 0, -1]),
)  # fmt: skip
wire_objects = st.dictionaries(st.sampled_from([*LOG_SCHEMA.names, "@extra", "extra"]), wire_values)
nearly_right = st.builds(lambda changes: record(0, **changes).raw, wire_objects)
torn = st.builds(
    lambda at, piece: (raw := record(0).raw or b"")[:at] + piece + raw[at + len(piece) :],
    st.integers(0, 130),
    st.binary(max_size=4),
)


@given(st.lists(st.none() | st.binary(max_size=60) | nearly_right | torn, max_size=6))
def test_no_bytes_whatever_stop_a_partition(raws: list[bytes | None]) -> None:
    batch = InteractionBatch(LevelRules(), signing_key=KEY)
    refused = batch.add([Record(raw, 0, n, 1000 + n) for n, raw in enumerate(raws)], now=NOW)
    table = batch.table(NOW)
    table.validate(full=True)
    offsets = table["kafka_offset"].to_pylist() + [bad.record.offset for bad in refused]
    assert sorted(offsets) == list(range(len(raws)))
    assert {bad.reason for bad in refused} <= REASONS
    assert batch.last_offsets() == ({0: len(raws) - 1} if raws else {})
