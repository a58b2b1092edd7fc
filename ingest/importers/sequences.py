"""Sequence files, as the generative-recommendation papers publish their splits: ``sequences.jsonl.gz``, line
u the item ids of user u in time order, and ``items.jsonl.gz`` with id, title, categories, brand.

The files have order but no times and no ratings: every entry becomes a ``purchase``, hence liked (there is no
disliked or neutral in them), and the n-th entry of every user happens n hours after ``START``, users a
millisecond apart. Line numbers, from 0, are the user ids.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from features.catalogue import Item
from features.interactions import Kind

from .dataset import Dataset, DatasetUnreadable, find, in_time_order, json_lines, open_bytes

SOURCE = "sequences"
FILES = ("sequences.jsonl.gz", "sequences.jsonl")
START = datetime(2014, 1, 1, tzinfo=UTC)

_HOUR = 3_600_000_000
_MILLISECOND = 1000


def read(path: Path) -> Dataset:
    """The sequences in the file ``path``, or in the folder ``path``; items from the file beside it.

    Raises DatasetUnreadable naming the line that is not a list of item ids.
    """
    file = find(path, FILES)
    decode = msgspec.json.Decoder(list[int | str]).decode
    users: list[str] = []
    items: list[str] = []
    times: list[int] = []
    start = int(START.timestamp()) * 1_000_000
    with open_bytes(file) as lines:
        for user, line in enumerate(lines):
            try:
                sequence = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DatasetUnreadable(
                    f"{file}, line {user + 1}: not a list of item ids ({error})"
                ) from None
            users += [str(user)] * len(sequence)
            items += map(str, sequence)
            times += [start + n * _HOUR + user * _MILLISECOND for n in range(len(sequence))]
    events = in_time_order(
        {"user_id": users, "item_id": items, "kind": [Kind.PURCHASE.value] * len(users), "occurred_at": times}
    )
    return Dataset(SOURCE, events, _items(file))


def _items(sequences: Path) -> list[Item]:
    file = sequences.with_name(sequences.name.replace("sequences", "items"))
    items: list[Item] = []

    def take(row: dict[str, Any]) -> None:
        paths = row.get("categories") or []
        categories = [part for path in paths for part in (path if isinstance(path, list) else [path])]
        kept = {name: row[name] for name in ("asin", "brand", "keyphrase") if row.get(name)}
        items.append(
            Item(
                item_id=str(row["id"]),
                title=str(row.get("title") or ""),
                text=str(row.get("description") or ""),
                categories=tuple(dict.fromkeys(map(str, categories))),
                attributes=kept,
            )
        )

    if file != sequences and file.exists():
        json_lines(file, take)
    return items
