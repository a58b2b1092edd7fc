"""What an interaction is on the wire: what is accepted, what is kept, what is refused and why."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import (
    Interaction,
    InvalidInteraction,
    Kind,
    decode_interaction,
    encode_interaction,
    json_schema,
)
from features.errors import BadInput, FeaturesError

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
ROOT = Path(__file__).parents[2]

ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=256)
times = st.datetimes(
    datetime(1990, 1, 2),
    datetime(2026, 5, 1),
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30)), timezone(timedelta(hours=-8))]),
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | numbers
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = set(json_schema()["properties"])
extras = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name not in FIELDS),
    json_values,
    max_size=4,
)
interactions = st.builds(
    Interaction,
    event_id=ids,
    user_id=ids,
    item_id=ids,
    kind=st.sampled_from(sorted(set(Kind) - {Kind.DWELL})),
    occurred_at=times,
    request_id=st.none() | ids,
    position=st.none() | st.integers(1, 2**31 - 1),
    policy_version=st.none() | ids,
    propensity=st.none() | st.floats(1e-300, 1),
    value=st.none() | numbers,
    text=st.none() | st.text(st.characters(codec="utf-8"), max_size=50),
    source=st.none() | ids,
    schema_version=st.sampled_from(["1.0", "1.1", "1.27"]),
    extra=extras,
)


def event(**changes: object) -> bytes:
    plain = {
        "event_id": "e1", "user_id": "u1", "item_id": "i1", "kind": "like",
        "occurred_at": "2026-04-30T10:00:00Z",
    }  # fmt: skip
    return json.dumps({name: value for name, value in (plain | changes).items() if value is not ...}).encode()


@given(interactions)
def test_what_is_encoded_is_decoded_unchanged(interaction: Interaction) -> None:
    assert decode_interaction(encode_interaction(interaction), now=NOW) == interaction


@given(interactions)
def test_every_accepted_event_fits_the_published_json_schema(interaction: Interaction) -> None:
    schema = json_schema()
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert list(validator.iter_errors(json.loads(encode_interaction(interaction)))) == []


def test_unknown_fields_are_kept_whatever_they_are_called() -> None:
    wire = {"extra": {"a": 1}, "@extra": [1, None], "device": {"os": "x"}, "n": 2.5}
    decoded = decode_interaction(event(**wire), now=NOW)
    assert decoded.extra == wire
    assert {name: json.loads(encode_interaction(decoded))[name] for name in wire} == wire


def test_unknown_fields_may_be_nested_and_large() -> None:
    wire = {"deep": [[[[{"a": [1, 2, {"b": None}]}]]]], "large": 10**30}
    decoded = decode_interaction(event(**wire), now=NOW)
    assert decoded.extra == wire
    assert decode_interaction(encode_interaction(decoded), now=NOW) == decoded


def test_a_newer_minor_version_is_accepted_and_keeps_its_number() -> None:
    decoded = decode_interaction(event(schema_version="1.9", mood="calm"), now=NOW)
    assert (decoded.schema_version, decoded.extra) == ("1.9", {"mood": "calm"})


def test_null_means_absent_for_optional_fields() -> None:
    assert decode_interaction(event(request_id=None, value=None), now=NOW).request_id is None


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "bad_json"),
        (b"{", "bad_json"),
        (b"[]", "bad_json"),
        (b'"text"', "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b'{"a":' + b"[" * 100_000, "bad_json"),
        (event() + b"x", "bad_json"),
        (event().replace(b"{", b'{"deep":' + b"[" * 65 + b"]" * 65 + b",", 1), "bad_field"),
        (event().replace(b"{", b'{"deep":' + b'{"a":' * 700 + b"1" + b"}" * 700 + b",", 1), "bad_field"),
        (event(kind="adore"), "unknown_kind"),
        (event(kind=""), "unknown_kind"),
        (event(user_id=...), "missing_field"),
        (event(event_id=...), "missing_field"),
        (event(occurred_at=None), "missing_field"),
        (event(kind=3), "bad_field"),
        (event(user_id=7), "bad_field"),
        (event(user_id=""), "bad_field"),
        (event(user_id="x" * 257), "bad_field"),
        (event(item_id="a\nb"), "bad_field"),
        (event(item_id="a\x7fb"), "bad_field"),
        (event(request_id="a\x85b"), "bad_field"),
        (event(occurred_at="yesterday"), "bad_field"),
        (event(occurred_at="2026-04-30T10:00:00"), "bad_field"),
        (event(occurred_at=1777543200), "bad_field"),
        (event(propensity=0), "bad_field"),
        (event(propensity=1.01), "bad_field"),
        (event(position=0), "bad_field"),
        (event(position=1.5), "bad_field"),
        (event(value="4"), "bad_field"),
        (event(kind="dwell", value=-1), "bad_field"),
        (event(schema_version="one"), "bad_field"),
        (event(schema_version=1.0), "bad_field"),
        (event().replace(b'"like"', b'"like","value":1e999'), "bad_field"),
        (event().replace(b'"like"', b'"like","value":NaN'), "bad_json"),
        (event(occurred_at="1989-12-31T23:59:59Z"), "absurd_time"),
        (event(occurred_at="2026-05-02T12:00:01Z"), "absurd_time"),
        (event(text="x" * (1 << 20)), "oversized"),
        (event(schema_version="2.0"), "unknown_major_version"),
        (b'{"schema_version":"3.1","everything":"else"}', "unknown_major_version"),
    ],
)
def test_what_cannot_be_accepted_is_refused_with_its_reason(raw: bytes, reason: str) -> None:
    with pytest.raises(InvalidInteraction) as refusal:
        decode_interaction(raw, now=NOW)
    assert refusal.value.reason == reason
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, FeaturesError)
    assert isinstance(refusal.value, BadInput)


def test_a_clock_one_day_ahead_is_still_accepted() -> None:
    assert decode_interaction(event(occurred_at="2026-05-02T12:00:00Z"), now=NOW).event_id == "e1"


def test_an_extra_field_cannot_take_the_name_of_a_field() -> None:
    clash = Interaction(
        event_id="e", user_id="u", item_id="i", kind=Kind.LIKE, occurred_at=NOW, extra={"value": 3}
    )
    with pytest.raises(InvalidInteraction, match="value"):
        encode_interaction(clash)


def test_the_published_schema_is_the_codes() -> None:
    published = json.loads((ROOT / "docs/interactions.schema.json").read_text(encoding="utf-8"))
    assert published == json_schema()


@pytest.mark.parametrize(
    "changes",
    [{"kind": "adore"}, {"user_id": ""}, {"propensity": 0}, {"position": 0}, {"schema_version": "2.0"}],
)
def test_the_json_schema_refuses_what_the_decoder_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(event(**changes)), json_schema())
