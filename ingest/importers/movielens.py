"""MovieLens: ``ratings.parquet``, the published ``ratings.csv``, ``movies.csv``, ``u.data`` and ``u.item``.

Ratings 0.5 to 5 become ``rating`` events. Level by the scale ``movielens``: from 4 liked, 3 and 3.5 neutral,
to 2.5 disliked. Films become items: title (with the year, as published), genres as categories.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from features.catalogue import Item
from features.interactions import Kind

from .dataset import Dataset, DatasetUnreadable, find, in_time_order, open_bytes

SOURCE = "movielens"
FILES = ("ratings.parquet", "ratings.csv", "u.data")

# u.item of MovieLens 100K marks genres by position (its u.genre file).
_GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_NO_GENRES = "(no genres listed)"


def read(path: Path) -> Dataset:
    """The dataset whose ratings are ``path``, or lie in the folder ``path``.

    Raises DatasetUnreadable when a file is not in the published format.
    """
    file = find(path, FILES)
    try:
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            return Dataset(SOURCE, _events(table, "userId", "movieId"), _parquet_items(table))
        if file.suffix == ".csv":
            return Dataset(SOURCE, _events(pacsv.read_csv(file), "userId", "movieId"), _csv_items(file))
        options = pacsv.ReadOptions(column_names=["userId", "movieId", "rating", "timestamp"])
        table = pacsv.read_csv(file, options, pacsv.ParseOptions(delimiter="\t"))
        return Dataset(SOURCE, _events(table, "userId", "movieId"), _u_items(file))
    except (pa.ArrowException, KeyError) as error:
        cause = " ".join(str(error).split())
        raise DatasetUnreadable(f"{file} is not in a MovieLens format: {cause}") from error


def _events(table: pa.Table, user: str, item: str) -> pa.Table:
    n = table.num_rows
    seconds = table["timestamp"].cast(pa.int64())
    return in_time_order(
        {
            "user_id": table[user].cast(pa.int64()).cast(pa.string()),
            "item_id": table[item].cast(pa.int64()).cast(pa.string()),
            "kind": pa.repeat(pa.scalar(Kind.RATING.value), n),
            "occurred_at": seconds.cast(pa.timestamp("s", "UTC")),
            "value": table["rating"].cast(pa.float64()),
        }
    )


def _parquet_items(table: pa.Table) -> list[Item]:
    if "title" not in table.column_names:
        return []
    films = table.group_by(["movieId"], use_threads=False).aggregate(
        [(name, "first") for name in ("title", "genres", "year") if name in table.column_names]
    )
    return [
        _item(row["movieId"], row["title_first"], row.get("genres_first"), row.get("year_first"))
        for row in films.to_pylist()
    ]


def _csv_items(ratings: Path) -> list[Item]:
    file = ratings.with_name("movies.csv")
    if not file.exists():
        return []
    films = pacsv.read_csv(
        file, parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(column_types={"title": pa.string(), "genres": pa.string()}),
    )  # fmt: skip
    return [_item(row["movieId"], row["title"], row["genres"], None) for row in films.to_pylist()]


def _u_items(ratings: Path) -> list[Item]:
    file = ratings.with_name("u.item")
    if not file.exists():
        return []
    with open_bytes(file) as raw:
        lines = raw.read().decode("latin-1").splitlines()
    films = []
    for number, line in enumerate(lines, 1):
        parts = line.split("|")
        if len(parts) < 5 + len(_GENRES_100K):
            raise DatasetUnreadable(f"{file}, line {number}: not a line of MovieLens 100K's u.item")
        flags = parts[5 : 5 + len(_GENRES_100K)]
        genres = "|".join(genre for genre, flag in zip(_GENRES_100K, flags, strict=True) if flag == "1")
        films.append(_item(parts[0], parts[1], genres, None))
    return films


def _item(movie_id: Any, title: str | None, genres: str | None, year: float | None) -> Item:
    title = title or ""
    if year and title and str(int(year)) not in title:
        title = f"{title} ({int(year)})"
    categories = tuple(genre for genre in (genres or "").split("|") if genre and genre != _NO_GENRES)
    return Item(item_id=str(movie_id), title=title, categories=categories)
