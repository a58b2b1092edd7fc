"""The paper's split of a data set folder, as rows of the catalogue."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.metrics import IntArray

HELD_BACK = 2
"""Items at the end of each history that no model is fitted to: validation and test."""


@dataclass(frozen=True)
class Dataset:
    """Histories and cases; item ids are their rows in the catalogue."""

    name: str
    items: pa.Table
    """item_id, title, categories, text; titles are empty where the data set has none."""
    n_items: int
    training: Sequence[IntArray]
    """Of every user."""
    histories: Sequence[IntArray]
    """Of each case: all items before the target."""
    targets: IntArray
    """[cases]."""
    order: IntArray
    """Items by training interactions, most first."""

    @property
    def has_titles(self) -> bool:
        """Whether there is any text to make codes of."""
        return any(self.items["title"].to_pylist())


def read(folder: Path, *, back: int = 1, users: int | None = None) -> Dataset:
    """Read ``sequences.jsonl.gz`` and ``items.jsonl.gz`` of ``folder``; the item ``back`` from the end is the
    target. ``users``: only so many cases, drawn by a fixed seed; models still learn from everybody."""
    with gzip.open(folder / "sequences.jsonl.gz", "rt") as lines:
        whole = [np.array(json.loads(line), dtype=np.int64) for line in lines]
    with gzip.open(folder / "items.jsonl.gz", "rt") as lines:
        items = [json.loads(line) for line in lines]
    n_items = len(items)
    row = {int(item["id"]): place for place, item in enumerate(items)}
    whole = [np.array([row[int(item)] for item in history], dtype=np.int64) for history in whole]
    whole = [history for history in whole if len(history) > HELD_BACK]
    training = [history[:-HELD_BACK] for history in whole]
    chosen = np.arange(len(whole))
    if users is not None:
        chosen = np.sort(np.random.default_rng(0).permutation(len(whole))[:users])
    counts = np.bincount(np.concatenate(training), minlength=n_items)
    return Dataset(
        name=folder.resolve().name,
        items=_table(items),
        n_items=n_items,
        training=training,
        histories=[whole[user][:-back] for user in chosen],
        targets=np.array([whole[user][-back] for user in chosen], dtype=np.int64),
        order=np.argsort(-counts, kind="stable"),
    )


def _table(items: Sequence[dict[str, object]]) -> pa.Table:
    def categories(item: dict[str, object]) -> list[str]:
        found = item.get("categories")
        return [str(name) for name in found[0]] if isinstance(found, list) and found else []

    return pa.table(
        {
            "item_id": [str(place) for place in range(len(items))],
            "title": [str(item.get("title") or "") for item in items],
            "categories": pa.array([categories(item) for item in items], pa.list_(pa.string())),
            "text": [str(item.get("brand") or "") for item in items],
        }
    )
