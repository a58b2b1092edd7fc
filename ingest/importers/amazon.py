"""Amazon reviews: the published JSON lines, of 2014/2018 (reviewerID, asin, overall, unixReviewTime) or 2023
(user_id, parent_asin, rating, timestamp in ms), packed or not; and the metadata file beside them.

A star rating with text becomes a ``review`` with its value, one without text a ``rating``. Level by the scale
``amazon``, the paper's: 4 and 5 liked, 2 and 3 neutral, 1 disliked.
"""

from itertools import chain
from pathlib import Path
from typing import Any

from features.catalogue import Item
from features.interactions import Kind

from .dataset import Dataset, find, in_time_order, json_lines

SOURCE = "amazon"
FILES = ("*_5.json.gz", "*_5.json", "reviews_*.json.gz", "*.json.gz", "*.jsonl.gz", "*.jsonl", "*.json")


def read(path: Path) -> Dataset:
    """The reviews in the file ``path``, or the first that lies in the folder ``path``.

    Items come from ``meta_<category>.json[l][.gz]`` beside it; without that file there are none. Raises
    DatasetUnreadable naming the line that is not in a published format.
    """
    file = find(path, FILES)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("user_id", "item_id", "kind", "occurred_at", "value", "text")
    }

    def take(row: dict[str, Any]) -> None:
        if "reviewerID" in row:
            user, item, stars = row["reviewerID"], row["asin"], row["overall"]
            micros = int(row["unixReviewTime"]) * 1_000_000
            words = (row.get("summary"), row.get("reviewText"))
        else:
            user, item, stars = row["user_id"], row.get("parent_asin") or row["asin"], row["rating"]
            micros = int(row["timestamp"]) * 1000
            words = (row.get("title"), row.get("text"))
        text = "\n".join(part.strip() for part in words if part and part.strip())
        columns["user_id"].append(str(user))
        columns["item_id"].append(str(item))
        columns["kind"].append((Kind.REVIEW if text else Kind.RATING).value)
        columns["occurred_at"].append(micros)
        columns["value"].append(float(stars))
        columns["text"].append(text or None)

    json_lines(file, take)
    return Dataset(SOURCE, in_time_order(columns), _items(file))


def _items(reviews: Path) -> list[Item]:
    metadata = _metadata_beside(reviews)
    items: dict[str, Item] = {}

    def take(row: dict[str, Any]) -> None:
        item_id = str(row.get("parent_asin") or row["asin"])
        items[item_id] = Item(
            item_id=item_id,
            title=str(row.get("title") or ""),
            text=_words(row.get("description")),
            categories=_categories(row),
            attributes={name: row[name] for name in ("brand", "store", "price") if row.get(name)},
        )

    if metadata is not None:
        json_lines(metadata, take, literals=True)
    return list(items.values())


def _metadata_beside(reviews: Path) -> Path | None:
    name = reviews.name
    for ending in (".gz", ".json", ".jsonl"):
        name = name.removesuffix(ending)
    category = name.removeprefix("reviews_").removesuffix("_5")
    for ending in (".json.gz", ".json", ".jsonl.gz", ".jsonl"):
        file = reviews.with_name(f"meta_{category}{ending}")
        if file.exists():
            return file
    return None


def _words(description: Any) -> str:
    if isinstance(description, list):
        return " ".join(str(part) for part in description if part)
    return str(description or "")


def _categories(row: dict[str, Any]) -> tuple[str, ...]:
    """2014 has lists of lists, later years one list under another name."""
    found = row.get("categories") or row.get("category") or []
    flat = chain.from_iterable(part if isinstance(part, list) else [part] for part in found)
    return tuple(dict.fromkeys(str(part) for part in flat if part))
