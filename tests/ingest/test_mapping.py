"""A producer's own names of kinds and fields become ours; what nothing maps is kept."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from features import Interaction, InvalidInteraction, Kind, decode_interaction
from features.settings import FeatureSettings
from ingest.lines import read_lines
from ingest.mapping import EventMapping, UnusableMapping, read_mapping

NOW = datetime(2026, 5, 1, tzinfo=UTC)
SHOP = """
source: shop
fields: {user_id: visitor.id, item_id: sku, kind: action, occurred_at: ts, value: stars}
time: ms
kinds: {viewed: impression, starred: rating, 7: like, heartbeat: null}
event_id: [visitor.id, sku, action, ts]
"""


def mapping(tmp_path: Path, text: str) -> EventMapping:
    (tmp_path / "mapping.yaml").write_text(text)
    return read_mapping(tmp_path / "mapping.yaml")


def mapped(rules: EventMapping, **event: Any) -> Interaction:
    raw = rules.apply(json.dumps(event).encode())
    assert raw is not None
    return decode_interaction(raw, now=NOW)


def test_names_units_and_ids_are_translated_and_the_rest_is_kept(tmp_path: Path) -> None:
    shop = mapping(tmp_path, SHOP)
    theirs = {
        "visitor": {"id": 17, "os": "x"},
        "sku": "tea",
        "action": "starred",
        "ts": 1767225600123,
        "stars": 4,
    }
    event = mapped(shop, **theirs, value="theirs", campaign="c1")
    assert (event.user_id, event.item_id, event.kind, event.value) == ("17", "tea", Kind.RATING, 4.0)
    assert event.occurred_at == datetime(2026, 1, 1, 0, 0, 0, 123000, tzinfo=UTC)
    assert event.source == "shop"
    assert event.extra == {"visitor": {"id": 17, "os": "x"}, "shop_value": "theirs", "campaign": "c1"}
    assert event.event_id == mapped(shop, **theirs).event_id
    assert event.event_id != mapped(shop, **(theirs | {"ts": 1767225600124})).event_id


def test_kinds_are_translated_dropped_or_left_alone(tmp_path: Path) -> None:
    shop = mapping(tmp_path, SHOP)
    event = {"visitor.id": "u", "sku": "tea", "ts": 1767225600000}
    assert mapped(shop, **event, action="viewed").kind is Kind.IMPRESSION
    assert mapped(shop, **event, action=7).kind is Kind.LIKE
    assert mapped(shop, **event, action="purchase").kind is Kind.PURCHASE
    assert shop.apply(json.dumps(event | {"action": "heartbeat"}).encode()) is None
    with pytest.raises(InvalidInteraction) as refusal:
        mapped(shop, **event, action="unheard of")
    assert refusal.value.reason == "unknown_kind"


@pytest.mark.parametrize(
    ("unit", "value", "expected"),
    [
        ("s", 1767225600, datetime(2026, 1, 1, tzinfo=UTC)),
        ("s", 1767225600.25, datetime(2026, 1, 1, 0, 0, 0, 250000, tzinfo=UTC)),
        ("s", "1767225600", datetime(2026, 1, 1, tzinfo=UTC)),
        ("ms", 1767225600001, datetime(2026, 1, 1, 0, 0, 0, 1000, tzinfo=UTC)),
        ("us", 1767225600000001, datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
        ("iso", "2026-01-01T01:00:00+01:00", datetime(2026, 1, 1, tzinfo=UTC)),
        ("iso\nzone: Europe/Berlin", "2026-01-01T01:00:00", datetime(2026, 1, 1, tzinfo=UTC)),
        ("iso\nzone: Europe/Berlin", "2026-01-01 00:00:00Z", datetime(2026, 1, 1, tzinfo=UTC)),
    ],
)
def test_units_of_time(tmp_path: Path, unit: str, value: Any, expected: datetime) -> None:
    rules = mapping(tmp_path, f"time: {unit}")
    event = mapped(rules, event_id="e", user_id="u", item_id="i", kind="like", occurred_at=value)
    assert event.occurred_at == expected


@pytest.mark.parametrize(
    ("text", "event", "reason"),
    [
        ("time: ms", {"occurred_at": "soon"}, "bad_field"),
        ("time: ms", {"occurred_at": True}, "bad_field"),
        ("time: s", {"occurred_at": 1e300}, "bad_field"),
        ("time: iso", {"occurred_at": 1767225600}, "bad_field"),
        ("zone: UTC", {"occurred_at": "soon"}, "bad_field"),
        ("time: s", {"occurred_at": 1767225600000}, "bad_field"),
        ("event_id: [nr]", {"event_id": None, "occurred_at": "2026-01-01T00:00:00Z"}, "missing_field"),
        ("fields: {value: stars}", {"occurred_at": "2026-01-01T00:00:00Z", "stars": "many"}, "bad_field"),
    ],
)
def test_what_cannot_be_translated_is_refused(
    tmp_path: Path, text: str, event: dict[str, Any], reason: str
) -> None:
    rules = mapping(tmp_path, text)
    whole = {"event_id": "e", "user_id": "u", "item_id": "i", "kind": "like"} | event
    with pytest.raises(InvalidInteraction) as refusal:
        mapped(rules, **whole)
    assert refusal.value.reason == reason


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
def test_a_line_that_is_no_object_is_refused_before_it_is_translated(raw: bytes) -> None:
    with pytest.raises(InvalidInteraction, match="bad_json"):
        EventMapping().apply(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fields: {userid: u}", "userid"),
        ("kinds: {a: adore}", "kinds"),
        ("time: days", "time"),
        ("zone: Mars/Olympus", "zone"),
        ("colour: red", "colour"),
        ("- a", "the file"),
        ("a: [", "cannot be read"),
    ],
)
def test_an_impossible_mapping_names_its_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UnusableMapping, match=words) as refusal:
        mapping(tmp_path, text)
    assert "\n" not in str(refusal.value)


def test_a_mapping_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UnusableMapping, match="cannot be read"):
        read_mapping(tmp_path / "none.yaml")


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    good = b'{"visitor":{"id":"u"},"sku":"i","action":"viewed","ts":1767225600000}'
    dropped = good.replace(b"viewed", b"heartbeat")
    lines = list(
        read_lines([good, b"", b"{", dropped], FeatureSettings(), now=NOW, mapping=mapping(tmp_path, SHOP))
    )
    assert [
        (line.number, line.event is not None, line.refusal and line.refusal.reason) for line in lines
    ] == [
        (1, True, None),
        (3, False, "bad_json"),
        (4, False, None),
    ]
