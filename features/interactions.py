"""The interaction: the one event of the product, and how it travels as JSON.

What is accepted is decided here and nowhere else: the command line, the server and the ingest workers call
the same decoder. Invariant: ``decode_interaction(encode_interaction(i)) == i`` for every accepted ``i``,
fields we do not know included (they are kept in ``extra`` and written back at the top level).
"""

import re
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from .errors import BadInput, FeaturesError

SCHEMA_VERSION = "1.0"
SCHEMA_MAJOR = 1
MAX_EVENT_BYTES = 1 << 20
"""Larger events are refused: Kafka's own default limit for a message is 1 MiB."""
EARLIEST = datetime(1990, 1, 1, tzinfo=UTC)
"""Nothing that can be recommended online happened earlier: an older time is a producer's zero or a typo."""
LATEST_AHEAD = timedelta(days=1)
"""How far a producer's clock may run ahead of ours."""

_EXTRA = "@extra"

Id = Annotated[str, Meta(min_length=1, max_length=256)]


class Kind(StrEnum):
    """What happened. ``served`` is written by the server; the rest by whoever sees the user."""

    SERVED = "served"
    IMPRESSION = "impression"
    CLICK = "click"
    DWELL = "dwell"
    LIKE = "like"
    DISLIKE = "dislike"
    HIDE = "hide"
    SHARE = "share"
    PURCHASE = "purchase"
    RATING = "rating"
    REVIEW = "review"
    COMMENT = "comment"


class Interaction(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True, gc=False
):
    """One thing one user did with (or was shown of) one item.

    Ids have 1 to 256 characters and no control characters. ``occurred_at`` carries its zone.
    """

    event_id: Id
    """Unique for the user: the same event sent twice carries the same id."""
    user_id: Id
    item_id: Id
    kind: Kind
    occurred_at: Annotated[datetime, Meta(tz=True)]
    """When it happened, RFC 3339 with zone on the wire."""
    request_id: Id | None = None
    """The slate it belongs to, as the server signed it."""
    position: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Place in the slate, 1 = first."""
    policy_version: Id | None = None
    propensity: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Probability with which the policy showed the item there; only on sampled slates."""
    value: float | None = None
    """dwell: seconds; rating and review: the score on the source's scale; purchase: amount."""
    text: str | None = None
    """What the user wrote (review, comment)."""
    source: Id | None = None
    """The system it comes from; picks the rating scale in the level rules."""
    schema_version: str = SCHEMA_VERSION
    extra: dict[str, Any] = msgspec.field(default_factory=dict, name=_EXTRA)
    """Fields of the event that this version does not know, as they came."""


class InvalidInteraction(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """An event that cannot be accepted.

    ``reason`` is one of bad_json, unknown_kind, missing_field, bad_field, absurd_time, oversized,
    unknown_major_version.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


def decode_interaction(
    raw: bytes, *, now: datetime, max_bytes: int = MAX_EVENT_BYTES, earliest: datetime = EARLIEST
) -> Interaction:
    """The interaction that ``raw`` holds.

    ``now`` is the clock that "absurdly in the future" is measured against. Raises InvalidInteraction.
    """
    return decode_until(raw, now + LATEST_AHEAD, max_bytes, earliest)


def decode_until(
    raw: bytes, latest: datetime, max_bytes: int = MAX_EVENT_BYTES, earliest: datetime = EARLIEST
) -> Interaction:
    """As ``decode_interaction``, with the latest acceptable time given: the form for loops."""
    if len(raw) > max_bytes:
        raise InvalidInteraction("oversized", f"{len(raw)} bytes, at most {max_bytes} are accepted")
    try:
        event = _decode(raw)
        if event.extra or event.schema_version != SCHEMA_VERSION:
            event = _decode_slowly(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        event = _decode_slowly(raw)
    # A control character needs an escape in JSON, or is DEL, or one of U+0080..U+009F.
    if _BACKSLASH in raw or _DEL in raw or not raw.isascii():
        _check_ids(event)
    if not earliest <= event.occurred_at <= latest:
        raise InvalidInteraction(
            "absurd_time",
            f"occurred_at {event.occurred_at.isoformat()} is outside {earliest.date()} .. "
            f"{latest.isoformat()}; send RFC 3339 with the zone and check the clock",
        )
    if event.value is not None and event.value < 0 and event.kind is Kind.DWELL:
        raise InvalidInteraction("bad_field", f"value {event.value}: a dwell time is seconds, 0 or more")
    return event


def encode_interaction(event: Interaction) -> bytes:
    """``event`` as JSON, its extra fields at the top level.

    Raises InvalidInteraction when an extra field bears the name of one of the schema's own.
    """
    if not event.extra:
        return _encode(event)
    clash = sorted(_FIELDS & event.extra.keys())
    if clash:
        raise InvalidInteraction("bad_field", f"extra field {clash[0]} has the name of a field of the schema")
    plain = msgspec.to_builtins(event)
    del plain[_EXTRA]
    return _encode(plain | event.extra)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of an interaction on the wire; further properties are allowed and kept."""
    (_,), definitions = msgspec.json.schema_components([Interaction], ref_template="#/$defs/{name}")
    own = definitions.pop("Interaction")
    own["properties"].pop(_EXTRA)
    own["properties"]["schema_version"]["pattern"] = rf"^{SCHEMA_MAJOR}\.[0-9]+$"
    for name, words in _FIELD_WORDS.items():
        own["properties"][name]["description"] = words
    own.pop("additionalProperties", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Interaction",
        "description": f"Interaction event of align3gr, schema version {SCHEMA_VERSION}. Unknown fields are "
        f"kept; any {SCHEMA_MAJOR}.x version is accepted. At most {MAX_EVENT_BYTES} bytes.",
        **{key: value for key, value in own.items() if key not in ("title", "description")},
        "additionalProperties": True,
        "$defs": definitions,
    }


_FIELD_WORDS = {
    "event_id": "Unique for the user: the same event sent twice carries the same id.",
    "user_id": "Who. Also the Kafka key, so that one user's events stay in order.",
    "item_id": "The item of the catalogue that it happened to.",
    "kind": "What happened.",
    "occurred_at": "When it happened: RFC 3339 with zone, from 1990 to at most one day ahead.",
    "request_id": "The slate it belongs to, exactly as the server returned it (signed).",
    "position": "Place in the slate, 1 = first.",
    "policy_version": "The policy that made the slate.",
    "propensity": "Probability of showing the item there; only on sampled slates.",
    "value": "dwell: seconds; rating, review, comment: score on the source's scale; purchase: amount.",
    "text": "What the user wrote.",
    "source": "The system it comes from; picks the rating scale.",
    "schema_version": "Version of this schema that the producer wrote.",
}

_FIELDS = frozenset(Interaction.__struct_encode_fields__) - {_EXTRA}
_MAX_DEPTH = 64
_REQUIRED = ("event_id", "user_id", "item_id", "kind", "occurred_at")
_KINDS = frozenset(Kind)
_ID_FIELDS = ("event_id", "user_id", "item_id", "request_id", "policy_version", "source")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")

_BACKSLASH, _DEL = 0x5C, 0x7F  # `int in bytes` is one memchr

_decode = msgspec.json.Decoder(Interaction).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


def _decode_slowly(raw: bytes) -> Interaction:
    """Decode an event with unknown fields or another minor version, or find the words for what is wrong."""
    try:
        wire = _decode_any(raw)
    except msgspec.ValidationError as error:
        raise InvalidInteraction("bad_field", _one_line(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInteraction("bad_json", _one_line(error)) from None
    if not isinstance(wire, dict):
        raise InvalidInteraction("bad_json", f"an event is a JSON object, not {type(wire).__name__}")
    _check_version(wire.get("schema_version", SCHEMA_VERSION))
    for name in _REQUIRED:
        if wire.get(name) is None:
            raise InvalidInteraction("missing_field", f"{name} is required")
    if isinstance(wire["kind"], str) and wire["kind"] not in _KINDS:
        raise InvalidInteraction("unknown_kind", f"kind {wire['kind'][:64]!r} is none of {', '.join(Kind)}")
    known = {name: value for name, value in wire.items() if name in _FIELDS}
    known[_EXTRA] = {name: value for name, value in wire.items() if name not in _FIELDS}
    if _deeper(known[_EXTRA], _MAX_DEPTH):
        raise InvalidInteraction(
            "bad_field", f"an unknown field is nested more than {_MAX_DEPTH} levels deep"
        )
    try:
        # No builtin types beside JSON's own: a date must still be a string that is converted.
        return msgspec.convert(known, Interaction, builtin_types=())
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidInteraction("bad_field", _one_line(error)) from None


def _deeper(value: Any, levels: int) -> bool:
    """Whether ``value`` nests deeper than ``levels``: what was read must also be written, on any stack."""
    if isinstance(value, dict):
        return levels == 0 or any(_deeper(inner, levels - 1) for inner in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper(inner, levels - 1) for inner in value)
    return False


def _check_version(version: Any) -> None:
    parts = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if parts is None:
        raise InvalidInteraction("bad_field", f'schema_version must read like "{SCHEMA_VERSION}"')
    if int(parts[1]) != SCHEMA_MAJOR:
        raise InvalidInteraction(
            "unknown_major_version",
            f"schema version {version} is not {SCHEMA_MAJOR}.x; upgrade align3gr, replay the dead letters",
        )


def _check_ids(event: Interaction) -> None:
    for name in _ID_FIELDS:
        value = getattr(event, name)
        if value is not None and _CONTROL.search(value):
            raise InvalidInteraction("bad_field", f"{name} holds a control character")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).replace("`", "")[:300] or type(error).__name__
