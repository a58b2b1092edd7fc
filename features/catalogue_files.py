"""Reading a producer's catalogue: JSON lines, CSV or Parquet, one item a row.

Columns: ``item_id`` (required), ``title``, ``text``, ``categories`` (a list, or names separated by ``|``),
``listed`` (default true), ``attributes`` (an object). Every other column is kept as an attribute.
"""

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from .catalogue import Item, ItemRefused

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}
"""File ending (before ``.gz``) -> format."""

_OWN = frozenset(Item.__struct_fields__)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def read_items(path: Path, file_format: str | None = None) -> Iterator[Item]:
    """The items in ``path``; the format is the ending's unless given.

    Raises ItemRefused naming the file and the line that cannot be an item.
    """
    ending = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    chosen = file_format or FORMATS.get(ending.lower())
    if chosen not in set(FORMATS.values()):
        raise ItemRefused(f"{path}: no known format; name one with --format jsonl, csv or parquet")
    try:
        for number, row in _ROWS[chosen](path):
            try:
                yield _item(row)
            except (msgspec.ValidationError, ValueError, TypeError) as error:
                cause = " ".join(str(error).replace("`", "").split())
                raise ItemRefused(f"{path}, line {number}: {cause}; nothing was loaded") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        cause = " ".join(str(error).split())
        raise ItemRefused(f"{path} cannot be read as {chosen}: {cause}; nothing was loaded") from error


def _item(row: Any) -> Item:
    if not isinstance(row, dict):
        raise ValueError("an object with item_id, title, text, categories is expected")
    if row.get("item_id") in (None, ""):
        raise ValueError("item_id is missing")
    item_id = row["item_id"]
    categories = row.get("categories") or ()
    if isinstance(categories, str):
        categories = [part.strip() for part in categories.split("|") if part.strip()]
    listed = row.get("listed")
    if isinstance(listed, str) and listed.strip():
        listed = _TRUTH.get(listed.strip().lower(), listed)
    attributes = dict(row.get("attributes") or {})
    attributes |= {name: value for name, value in row.items() if name not in _OWN and value not in (None, "")}
    return msgspec.convert(
        {
            "item_id": str(item_id) if isinstance(item_id, int) else item_id,
            "title": row.get("title") or "",
            "text": row.get("text") or "",
            "categories": categories,
            "attributes": attributes,
            "listed": True if listed in (None, "") else listed,
        },
        Item,
    )


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    decode = msgspec.json.Decoder().decode
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise ItemRefused(
                        f"{path}, line {number}: not JSON in utf-8 ({error}); nothing was loaded"
                    ) from None


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), restkey="more columns")
        if "item_id" not in (reader.fieldnames or ()):
            raise ItemRefused(f"{path}: the first line must name the columns, item_id among them")
        for row in reader:
            yield reader.line_num, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    file = pq.ParquetFile(path)
    if "item_id" not in file.schema_arrow.names:
        raise ItemRefused(f"{path}: there is no column item_id")
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield number, row


_ROWS = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
