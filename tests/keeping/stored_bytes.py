"""Every byte that a store keeps, as it would be read by who takes the disk: for tests that grep it.

Parquet pages are compressed, so a plain grep sees nothing in them; here each page of each column chunk, the
dictionary pages too, is taken out of its file and decompressed. Page headers are in Thrift's compact
protocol (parquet.thrift, PageHeader).
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"


def files_with(home: Path, text: str) -> list[str]:
    """Files under ``home`` that hold ``text``: in their name, their bytes, or a page of a Parquet file."""
    wanted = text.encode()
    return [
        str(file.relative_to(home))
        for file in sorted(home.rglob("*"))
        if file.is_file() and (text in file.name or any(wanted in part for part in stored(file)))
    ]


def stored(file: Path) -> Iterator[bytes]:
    """The file's bytes, then those of each of its pages."""
    raw = file.read_bytes()
    yield raw
    if len(raw) > 12 and raw[:4] == MAGIC == raw[-4:]:
        yield from pages(file, raw)


def pages(file: Path, raw: bytes) -> Iterator[bytes]:
    """Every page of a Parquet file, decompressed: dictionary pages first in each column chunk."""
    metadata = pq.read_metadata(file)
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            column = metadata.row_group(group).column(place)
            at = column.data_page_offset
            if column.dictionary_page_offset:
                at = min(at, column.dictionary_page_offset)
            end = at + column.total_compressed_size
            while at < end:
                header, size = _struct(raw, at)
                at += size
                body = raw[at : at + header[3]]
                at += header[3]
                yield _decompressed(body, header, column.compression)


def _decompressed(body: bytes, header: dict, codec: str) -> bytes:  # type: ignore[type-arg]
    second = header.get(8)  # a data page of version 2: its levels stand before the values, never compressed
    levels = second.get(5, 0) + second.get(6, 0) if second else 0
    if codec == "UNCOMPRESSED" or (second and second.get(7) is False):
        return body
    plain: bytes = pa.Codec(codec.lower()).decompress(body[levels:], header[2] - levels, asbytes=True)
    return body[:levels] + plain


def _struct(raw: bytes, at: int) -> tuple[dict, int]:  # type: ignore[type-arg]
    """A Thrift compact struct: field id -> value, and how many bytes it took."""
    start, fields, last = at, {}, 0
    while raw[at]:
        kind, delta = raw[at] & 0x0F, raw[at] >> 4
        at += 1
        if delta:
            last += delta
        else:
            number, at = _varint(raw, at)
            last = number >> 1 ^ -(number & 1)
        fields[last], at = _value(raw, at, kind)
    return fields, at + 1 - start


def _value(raw: bytes, at: int, kind: int):  # type: ignore[no-untyped-def]
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        number, at = _varint(raw, at)
        return number >> 1 ^ -(number & 1), at
    if kind == 8:
        length, at = _varint(raw, at)
        return raw[at : at + length], at + length
    if kind == 12:
        fields, size = _struct(raw, at)
        return fields, at + size
    raise ValueError(f"a page header holds a Thrift value of kind {kind}")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = raw[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
