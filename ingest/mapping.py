"""From a producer's own names of kinds and fields to ours, by a YAML file.

    source: shop                 # constant; picks the rating scale of the level rules
    fields:                      # ours: theirs, dots reach into nested objects
      user_id: visitor.id
      item_id: sku
      kind: action
      occurred_at: ts
      value: stars
    time: ms                     # iso (default), s, ms or us since 1970
    zone: Europe/Berlin          # for iso times without a zone; without it they are refused
    kinds:                       # theirs: ours; null drops the event on purpose
      viewed: impression
      starred: rating
      heartbeat: null
    event_id: [visitor.id, sku, action, ts]    # where the producer has none: a hash of these

A field of ours that is not mapped is looked for under its own name. Fields that nothing maps stay, as extra
fields; one that bears the name of a mapped field of ours stays as ``<source or producer>_<name>``. Numbers
become strings where ids are asked for.
"""

from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from features.errors import BadInput
from features.interactions import Interaction, InvalidInteraction, Kind

from .errors import IngestError

_OUR_FIELDS = frozenset(Interaction.__struct_fields__) - {"extra"}
_ID_FIELDS = ("event_id", "user_id", "item_id", "request_id", "policy_version", "source")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROS = {"s": 1_000_000, "ms": 1000, "us": 1}

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class UnusableMapping(IngestError, BadInput):  # noqa: N818 - reads as what it is
    """A mapping file that cannot be read, or that says something impossible."""


class EventMapping(BaseModel):
    """One producer's names and units. Frozen; read it with ``read_mapping``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = None
    """System that every event comes from, unless the event says so itself."""
    fields: dict[str, str] = {}
    """Field of ours -> field of theirs, dots reach into nested objects."""
    kinds: dict[str, Kind | None] = {}
    """Kind of theirs -> kind of ours; none drops the event. Kinds that are not named stay as they are."""
    time: Literal["iso", "s", "ms", "us"] = "iso"
    """Unit of the time field."""
    zone: str | None = None
    """Time zone of iso times that carry none."""
    event_id: list[str] = []
    """Fields of theirs whose hash is the event id, where the event has none."""

    @field_validator("fields")
    @classmethod
    def _known(cls, fields: dict[str, str]) -> dict[str, str]:
        stray = sorted(set(fields) - _OUR_FIELDS)
        if stray:
            raise ValueError(
                f"{stray[0]} is no field of an interaction; there are {', '.join(sorted(_OUR_FIELDS))}"
            )
        return fields

    @field_validator("kinds", mode="before")
    @classmethod
    def _numbers_are_names(cls, kinds: Any) -> Any:
        return {str(name): kind for name, kind in kinds.items()} if isinstance(kinds, dict) else kinds

    @field_validator("zone")
    @classmethod
    def _exists(cls, zone: str | None) -> str | None:
        if zone is not None:
            try:
                ZoneInfo(zone)
            except (ZoneInfoNotFoundError, ValueError) as error:
                raise ValueError(f"no time zone {zone}") from error
        return zone

    def apply(self, raw: bytes) -> bytes | None:
        """One event of theirs as one of ours, still JSON and not yet checked; None when it is dropped.

        Raises InvalidInteraction when it is no JSON object, or its time cannot be understood.
        """
        try:
            theirs = _decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidInteraction("bad_json", " ".join(str(error).split())) from None
        if not isinstance(theirs, dict):
            raise InvalidInteraction("bad_json", f"an event is a JSON object, not {type(theirs).__name__}")
        ours = self._renamed(theirs)
        kind = ours.get("kind")
        if isinstance(kind, str | int) and str(kind) in self.kinds:
            mapped = self.kinds[str(kind)]
            if mapped is None:
                return None
            ours["kind"] = mapped.value
        if ours.get("occurred_at") is not None:
            ours["occurred_at"] = self._time(ours["occurred_at"])
        if ours.get("source") is None and self.source is not None:
            ours["source"] = self.source
        if ours.get("event_id") is None and self.event_id:
            ours["event_id"] = self._hashed(theirs)
        for name in _ID_FIELDS:
            value = ours.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                ours[name] = str(value)
        try:
            return _encode(ours)
        except RecursionError:
            raise InvalidInteraction("bad_json", "the event is nested too deeply") from None

    def _renamed(self, theirs: dict[str, Any]) -> dict[str, Any]:
        ours: dict[str, Any] = {}
        taken = set(self.fields.values())
        for name, value in theirs.items():
            if name in self.fields and self.fields[name] != name:
                if name not in taken:
                    ours[f"{self.source or 'producer'}_{name}"] = value
            elif name not in taken:
                ours[name] = value
        for name, path in self.fields.items():
            value = _reach(theirs, path)
            if value is not None:
                ours[name] = value
        return ours

    def _time(self, value: Any) -> Any:
        if self.time != "iso":
            return self._since_1970(value)
        if not isinstance(value, str):
            raise InvalidInteraction(
                "bad_field", f"time {value!r} is no ISO text; set time: s, ms or us in the mapping"
            )
        if self.zone is None:
            return value
        try:
            at = datetime.fromisoformat(value)
        except ValueError:
            return value  # the decoder has the words for what is wrong with it
        return (at if at.tzinfo else at.replace(tzinfo=ZoneInfo(self.zone))).isoformat()

    def _since_1970(self, value: Any) -> str:
        try:
            number = float(value) if isinstance(value, str) else value
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise TypeError("a number is expected")
            return (_EPOCH + timedelta(microseconds=round(number * _MICROS[self.time]))).isoformat()
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidInteraction(
                "bad_field", f"time {value!r} is no number of {self.time}: {error}"
            ) from None

    def _hashed(self, theirs: dict[str, Any]) -> str:
        parts = [_reach(theirs, path) for path in self.event_id]
        for path, part in zip(self.event_id, parts, strict=True):
            if part is None:
                raise InvalidInteraction("missing_field", f"{path} is needed for the event id")
        return blake2b(_encode(parts), digest_size=16).hexdigest()


def read_mapping(file: Path) -> EventMapping:
    """The mapping in ``file``. Raises UnusableMapping, naming the key that is wrong."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UnusableMapping(f"mapping {file} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return EventMapping.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UnusableMapping(f"mapping {file}: {key}: {first['msg']}; see docs/producer.md") from error


def _reach(theirs: dict[str, Any], path: str) -> Any:
    """The value under ``path``: that very name if there is one, else step by step through nested objects."""
    if path in theirs:
        return theirs[path]
    value: Any = theirs
    for step in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(step)
    return value
