"""What an importer returns: one table of events in time order, and the items they are about."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import msgspec
import pyarrow as pa

from features.catalogue import Item
from features.errors import BadInput
from features.interactions import Interaction, Kind
from ingest.errors import IngestError

EVENTS_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("occurred_at", pa.timestamp("us", "UTC")),
        pa.field("value", pa.float64()),
        pa.field("text", pa.string()),
        pa.field("event_id", pa.string()),
    ]
)
"""``value``: the rating on the source's own scale, or null. ``event_id``: null where the source has none."""

_BATCH = 65_536
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class DatasetUnreadable(IngestError, BadInput):  # noqa: N818 - reads as what it is
    """A file is not in the published format that was named."""


@dataclass(frozen=True)
class Dataset:
    """One published dataset, read."""

    source: str
    """Name of the rating scale in the level rules; every event carries it."""
    events: pa.Table
    """EVENTS_SCHEMA in time order; events of the same moment keep the order of the file."""
    items: list[Item]
    """What the source says about its items; empty where it says nothing."""


def in_time_order(columns: dict[str, Any]) -> pa.Table:
    """EVENTS_SCHEMA from ``columns`` (missing ones are null), sorted by time; ties keep the file's order."""
    n = len(columns["user_id"])
    arrays = []
    for field in EVENTS_SCHEMA:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(n, field.type))
        elif isinstance(values, pa.Array | pa.ChunkedArray):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    # Arrow's sort is stable.
    return pa.table(arrays, schema=EVENTS_SCHEMA).sort_by([("occurred_at", "ascending")])


def interactions(events: pa.Table, source: str) -> Iterator[Interaction]:
    """``events`` (EVENTS_SCHEMA, in time order) as interactions.

    Event ids depend on the event alone, so that a replay started twice is stored twice and counted once:
    a hash of user, item, kind and time, numbered where one user does the same twice in a moment.
    """
    moment = -1
    times_seen: dict[tuple[str, str, str], int] = {}
    for batch in events.to_batches(max_chunksize=_BATCH):
        plain = batch.set_column(3, "occurred_at", batch["occurred_at"].cast(pa.int64()))
        for user, item, kind, micros, value, text, event_id in zip(
            *(c.to_pylist() for c in plain), strict=True
        ):
            if micros != moment:
                moment, times_seen = micros, {}
            if event_id is None:
                key = (user, item, kind)
                nth = times_seen.get(key, 0)
                times_seen[key] = nth + 1
                words = f"{user}\0{item}\0{kind}\0{micros}\0{nth}".encode()
                event_id = f"{source}-{blake2b(words, digest_size=12).hexdigest()}"
            yield Interaction(
                event_id=event_id,
                user_id=user,
                item_id=item,
                kind=Kind(kind),
                occurred_at=_EPOCH + timedelta(microseconds=micros),
                value=value,
                text=text,
                source=source,
            )


def json_lines(path: Path, take: Callable[[dict[str, Any]], None], *, literals: bool = False) -> None:
    """Hand every object of a JSON-lines file (``.gz`` or plain) to ``take``.

    ``literals``: the lines may be Python literals instead (Amazon's metadata of 2014). Raises
    DatasetUnreadable naming the line that is no object or that ``take`` finds a field missing or wrong in.
    """
    decode = msgspec.json.Decoder().decode
    for number, line in _lines(path):
        try:
            row = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            row = _literal(line) if literals else None
            if row is None:
                raise DatasetUnreadable(
                    f"{path}, line {number}: not JSON ({error}); name the right file"
                ) from None
        if not isinstance(row, dict):
            raise DatasetUnreadable(f"{path}, line {number}: a JSON object is expected")
        try:
            take(row)
        except KeyError as error:
            raise DatasetUnreadable(
                f"{path}, line {number}: no field {error}; is this the dataset you named?"
            ) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise DatasetUnreadable(f"{path}, line {number}: {error}") from None


def open_bytes(path: Path) -> IO[bytes]:
    """``path`` for reading, unpacked when it ends in ``.gz``. Raises DatasetUnreadable when it is missing."""
    try:
        if path.suffix == ".gz":
            import gzip

            return gzip.open(path, "rb")  # type: ignore[return-value]
        return path.open("rb")
    except OSError as error:
        raise DatasetUnreadable(f"{path} cannot be opened: {error.strerror}") from error


def find(path: Path, names: Iterable[str]) -> Path:
    """``path`` itself when it is a file, else the first of ``names`` in that folder."""
    if path.is_file():
        return path
    for name in names:
        for found in sorted(path.glob(name)):
            return found
    if not path.exists():
        raise DatasetUnreadable(f"{path} does not exist; name the dataset's file or its folder")
    raise DatasetUnreadable(f"{path} holds none of {', '.join(names)}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
        except (OSError, EOFError) as error:
            raise DatasetUnreadable(f"{path} cannot be read to its end: {error}") from error


def _literal(line: bytes) -> object:
    import ast

    try:
        return ast.literal_eval(line.decode())
    except (ValueError, SyntaxError, UnicodeDecodeError, MemoryError, RecursionError):
        return None
