"""A hash over the logical rows of a table: the values themselves, whatever file or library held them.

Every column is a stream of its own (nulls, lengths, values as little-endian bytes), so the hash does not
depend on how the rows were cut into batches. Row order counts: hash sorted rows.
"""

from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class RowsHash:
    """Takes tables of one schema, in order; ``hexdigest`` is over all their rows."""

    def __init__(self, columns: list[str]) -> None:
        self._streams = {
            name: {part: blake2b(digest_size=32) for part in ("lists", "nulls", "lengths", "values")}
            for name in columns
        }
        self._rows = 0

    def update(self, table: pa.Table) -> None:
        """Add the rows of ``table``; columns that were not named are left out."""
        self._rows += table.num_rows
        for name, streams in self._streams.items():
            for chunk in table.column(name).chunks:
                _add(streams, chunk)

    def hexdigest(self, length: int = 16) -> str:
        """``length`` hexadecimal digits over everything added so far."""
        whole = blake2b(str(self._rows).encode(), digest_size=32)
        for name, streams in self._streams.items():
            whole.update(name.encode() + b"\0")
            for stream in streams.values():
                whole.update(stream.digest())
        return whole.hexdigest()[:length]


def _add(streams: dict[str, Any], values: pa.Array) -> None:
    if pa.types.is_list(values.type):
        streams["lists"].update(_bytes(pc.fill_null(values.value_lengths(), -1), "<i4"))
        values = values.flatten()
    streams["nulls"].update(_bytes(values.is_valid().cast(pa.uint8()), "<u1"))
    if pa.types.is_string(values.type):
        streams["lengths"].update(_bytes(pc.fill_null(pc.binary_length(values), 0), "<i4"))
        streams["values"].update(_text(values))
    elif pa.types.is_timestamp(values.type):
        streams["values"].update(_bytes(pc.fill_null(values.cast(pa.int64()), 0), "<i8"))
    else:
        streams["values"].update(_bytes(pc.fill_null(values.cast(pa.float64()), 0.0), "<f8"))


def _bytes(values: pa.Array, layout: str) -> Any:
    return np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype=layout).data


def _text(values: pa.Array) -> Any:
    """The UTF-8 bytes of all strings of the array, one after another."""
    offsets, data = values.buffers()[1], values.buffers()[2]
    if data is None or not len(values):
        return b""
    if values.null_count:  # what lies under a null is not defined: write the strings anew
        values = pc.drop_null(values)
        return b"" if not len(values) else _text(pa.concat_arrays([values]))
    starts = np.frombuffer(offsets, dtype=np.int32)
    first, last = starts[values.offset], starts[values.offset + len(values)]
    return memoryview(data)[int(first) : int(last)]
