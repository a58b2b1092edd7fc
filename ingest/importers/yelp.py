"""Yelp: the published ``yelp_academic_dataset_review.json`` (JSON lines), ``..._business.json`` beside it.

A review becomes a ``review`` with its stars as value, under its own review_id. Level by the scale ``yelp``,
the paper's: 4 and 5 liked, 2 and 3 neutral, 1 disliked. Businesses become items: name, categories, city.
Dates carry no zone and are read as UTC.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.catalogue import Item
from features.interactions import Kind

from .dataset import Dataset, find, in_time_order, json_lines

SOURCE = "yelp"
FILES = ("*review.json", "*review.json.gz", "*review.jsonl")


def read(path: Path) -> Dataset:
    """The reviews in the file ``path``, or in the folder ``path``.

    Raises DatasetUnreadable naming the line that is not in the published format.
    """
    file = find(path, FILES)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user_id", "item_id", "kind", "occurred_at", "value", "text", "event_id")
    }

    def take(row: dict[str, Any]) -> None:
        columns["user_id"].append(str(row["user_id"]))
        columns["item_id"].append(str(row["business_id"]))
        columns["kind"].append((Kind.REVIEW if row.get("text") else Kind.RATING).value)
        columns["occurred_at"].append(datetime.fromisoformat(row["date"]).replace(tzinfo=UTC))
        columns["value"].append(float(row["stars"]))
        columns["text"].append(row.get("text") or None)
        columns["event_id"].append(str(row["review_id"]))

    json_lines(file, take)
    return Dataset(SOURCE, in_time_order(columns), _items(file))


def _items(reviews: Path) -> list[Item]:
    file = reviews.with_name(reviews.name.replace("review", "business"))
    items: list[Item] = []

    def take(row: dict[str, Any]) -> None:
        categories = row.get("categories") or ""
        items.append(
            Item(
                item_id=str(row["business_id"]),
                title=str(row["name"]),
                categories=tuple(part.strip() for part in categories.split(",") if part.strip()),
                attributes={name: row[name] for name in ("city", "state") if row.get(name)},
            )
        )

    if file != reviews and file.exists():
        json_lines(file, take)
    return items
