"""Importers read the published formats, in time order, with ids that are the same every time."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features import Interaction, Kind, Level, LevelRules, decode_interaction, encode_interaction, level_of
from features.catalogue import Item
from features.errors import BadInput
from ingest.importers import Dataset, DatasetUnreadable, interactions, read_dataset

DATA = Path(__file__).parents[3] / "shared" / "data"
NOW = datetime(2026, 5, 1, tzinfo=UTC)
LIKED, NEUTRAL, DISLIKED = Level.LIKED, Level.NEUTRAL, Level.DISLIKED


def events_of(dataset: Dataset) -> list[Interaction]:
    return list(interactions(dataset.events, dataset.source))


def levels_of(dataset: Dataset) -> list[Level | None]:
    return [level_of(event, LevelRules()) for event in events_of(dataset)]


def lines(path: Path, rows: list[Any]) -> Path:
    raw = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def movielens_parquet(folder: Path) -> Path:
    table = pa.table(
        {
            "movieId": [31, 7, 31], "title": ["Dangerous Minds", None, "Dangerous Minds"],
            "year": [1995.0, None, 1995.0], "genres": ["Drama", "(no genres listed)", "Drama"],
            "userId": [1, 1, 2], "rating": [2.5, 4.0, 3.5],
            "timestamp": [1260759144, 1260759000, 1260759144],
        }
    )  # fmt: skip
    pq.write_table(table, folder / "ratings.parquet")
    return folder / "ratings.parquet"


def movielens_csv(folder: Path) -> Path:
    (folder / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,7,4.0,1260759000\n2,31,3.5,1260759144\n"
    )
    (folder / "movies.csv").write_text(
        'movieId,title,genres\n31,Dangerous Minds (1995),Drama\n7,"Sabrina, so (1995)",(no genres listed)\n'
    )
    return folder / "ratings.csv"


def movielens_100k(folder: Path) -> Path:
    (folder / "u.data").write_text("1\t31\t2\t1260759144\n1\t7\t4\t1260759000\n2\t31\t3\t1260759144\n")
    drama = "|".join("1" if n == 8 else "0" for n in range(19))
    (folder / "u.item").write_bytes(
        f"31|Café Minds (1995)|01-Jan-1995||http://x|{drama}\n".encode("latin-1")
        + f"7|Sabrina (1995)|01-Jan-1995||http://x|{'|'.join('0' * 19)}\n".encode()
    )
    return folder / "u.data"


@pytest.mark.parametrize("write", [movielens_parquet, movielens_csv, movielens_100k])
def test_movielens_in_every_published_format(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    dataset = read_dataset("movielens", write(tmp_path))
    events = events_of(dataset)
    assert [(e.user_id, e.item_id) for e in events] == [("1", "7"), ("1", "31"), ("2", "31")]
    assert {e.kind for e in events} == {Kind.RATING}
    assert events[0].occurred_at == datetime.fromtimestamp(1260759000, UTC)
    assert levels_of(dataset) == [LIKED, DISLIKED, NEUTRAL]
    first = next(item for item in dataset.items if item.item_id == "31")
    assert first.title.endswith("Minds (1995)")
    assert first.categories == ("Drama",)
    assert len(dataset.items) == 2


def test_a_folder_stands_for_the_file_in_it(tmp_path: Path) -> None:
    movielens_csv(tmp_path)
    assert read_dataset("movielens", tmp_path).events.num_rows == 3


def test_event_ids_are_the_same_every_time_and_differ_for_every_event(tmp_path: Path) -> None:
    twice = "userId,movieId,rating,timestamp\n" + "1,31,2.5,1260759144\n" * 2 + "2,31,2.5,1260759144\n"
    (tmp_path / "ratings.csv").write_text(twice)
    ids = [event.event_id for event in events_of(read_dataset("movielens", tmp_path))]
    assert ids == [event.event_id for event in events_of(read_dataset("movielens", tmp_path))]
    assert len(set(ids)) == 3


AMAZON_2014 = [
    {"reviewerID": "A2", "asin": "B1", "reviewText": "Fine.", "summary": "good", "overall": 5.0,
     "unixReviewTime": 1393545600, "helpful": [0, 0]},
    {"reviewerID": "A1", "asin": "B1", "reviewText": "", "summary": "", "overall": 1.0,
     "unixReviewTime": 1390000000},
    {"reviewerID": "A1", "asin": "B2", "reviewText": "so so", "overall": 3.0, "unixReviewTime": 1399999999},
]  # fmt: skip


@pytest.mark.parametrize("name", ["Instruments_5.json.gz", "reviews_Instruments_5.json"])
def test_amazon_reviews_with_the_metadata_of_2014(tmp_path: Path, name: str) -> None:
    lines(tmp_path / name, AMAZON_2014)
    lines(
        tmp_path / "meta_Instruments.json",
        ["{'asin': 'B1', 'title': 'A pick', 'categories': [['Instruments', 'Picks']], 'price': 3.5}\n"],
    )
    dataset = read_dataset("amazon", tmp_path / name)
    first, second, third = events_of(dataset)
    assert (first.user_id, first.kind, first.text) == ("A1", Kind.RATING, None)
    assert (second.kind, second.text, second.value) == (Kind.REVIEW, "good\nFine.", 5.0)
    assert third.text == "so so"
    assert levels_of(dataset) == [DISLIKED, LIKED, NEUTRAL]
    assert dataset.items == [
        Item(item_id="B1", title="A pick", categories=("Instruments", "Picks"), attributes={"price": 3.5})
    ]


def test_amazon_reviews_of_2023(tmp_path: Path) -> None:
    review = {
        "user_id": "AE", "asin": "B1-red", "parent_asin": "B1", "rating": 4.0, "title": "ok",
        "text": "works", "timestamp": 1588687728923,
    }  # fmt: skip
    meta = {
        "parent_asin": "B1",
        "title": "Mug",
        "description": ["Holds tea.", "Blue."],
        "categories": ["Cups"],
    }
    lines(tmp_path / "All_Beauty.jsonl", [review])
    lines(tmp_path / "meta_All_Beauty.jsonl", [meta])
    dataset = read_dataset("amazon", tmp_path / "All_Beauty.jsonl")
    (event,) = events_of(dataset)
    assert event.item_id == "B1"
    assert event.occurred_at == datetime(2020, 5, 5, 14, 8, 48, 923000, tzinfo=UTC)
    assert dataset.items[0].words == "Mug. Cups. Holds tea. Blue."
    assert levels_of(dataset) == [LIKED]


def test_yelp_reviews_and_businesses(tmp_path: Path) -> None:
    review = {"review_id": "r1", "user_id": "u1", "business_id": "b1", "stars": 2.0, "useful": 0,
              "text": "Slow.", "date": "2018-07-07 22:09:11"}  # fmt: skip
    business = {
        "business_id": "b1",
        "name": "Cafe",
        "city": "Tampa",
        "stars": 4.0,
        "categories": "Coffee & Tea, Food",
    }
    lines(tmp_path / "yelp_academic_dataset_review.json", [review])
    lines(tmp_path / "yelp_academic_dataset_business.json", [business])
    dataset = read_dataset("yelp", tmp_path)
    (event,) = events_of(dataset)
    assert (event.event_id, event.kind, event.value, event.source) == ("r1", Kind.REVIEW, 2.0, "yelp")
    assert event.occurred_at == datetime(2018, 7, 7, 22, 9, 11, tzinfo=UTC)
    assert levels_of(dataset) == [NEUTRAL]
    assert dataset.items == [
        Item(item_id="b1", title="Cafe", categories=("Coffee & Tea", "Food"), attributes={"city": "Tampa"})
    ]


def test_sequence_files_keep_their_order_and_are_liked(tmp_path: Path) -> None:
    lines(tmp_path / "sequences.jsonl.gz", [[3, 1], [1, 2, 3]])
    lines(tmp_path / "items.jsonl.gz", [{"id": 1, "title": "One", "categories": [["A", "B"]], "brand": "X"}])
    dataset = read_dataset("sequences", tmp_path)
    by_user: dict[str, list[str]] = {}
    for event in events_of(dataset):
        by_user.setdefault(event.user_id, []).append(event.item_id)
    assert by_user == {"0": ["3", "1"], "1": ["1", "2", "3"]}
    assert set(levels_of(dataset)) == {LIKED}
    assert dataset.items == [Item(item_id="1", title="One", categories=("A", "B"), attributes={"brand": "X"})]


@pytest.mark.parametrize("write", [movielens_parquet, movielens_csv, movielens_100k])
def test_every_imported_event_is_accepted_by_the_decoder(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    for event in events_of(read_dataset("movielens", write(tmp_path))):
        assert decode_interaction(encode_interaction(event), now=NOW) == event


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("movielens", "ratings.csv", b"a,b\n1,2\n", "ratings.csv"),
        ("movielens", "ratings.csv", b"userId,movieId,rating,timestamp\n1,2,good,3\n", "MovieLens"),
        ("movielens", "ratings.parquet", b"not parquet", "MovieLens"),
        ("amazon", "x_5.json", b'{"reviewerID":"a"}\n', "line 1"),
        ("amazon", "x_5.json", b'{"a":1}\n', "line 1"),
        ("amazon", "x_5.json", b"\n[]\n", "line 2"),
        ("amazon", "x_5.json", b"{", "line 1"),
        ("amazon", "x_5.json.gz", b"not gzip", "cannot be read"),
        ("yelp", "a_review.json", b'{"review_id":"r"}\n', "no field"),
        ("sequences", "sequences.jsonl", b"[1]\n{}\n", "line 2"),
        ("sequences", "other.txt", b"", "holds none"),
        ("netflix", "ratings.csv", b"", "no importer"),
    ],
)
def test_what_is_not_the_named_format_is_refused(
    tmp_path: Path, name: str, file: str, content: bytes, words: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DatasetUnreadable, match=words) as refusal:
        read_dataset(name, tmp_path)
    assert isinstance(refusal.value, BadInput)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnreadable, match="does not exist"):
        read_dataset("movielens", tmp_path / "nowhere")


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data folder beside the checkout")


@needs_data
def test_movielens_small_has_its_published_counts_and_levels() -> None:
    dataset = read_dataset("movielens", DATA / "movielens-small" / "ratings.parquet")
    levels = Counter(levels_of(dataset))
    total = sum(levels.values())
    assert total == 100_004
    assert len(dataset.items) == 9066
    assert len({event.event_id for event in events_of(dataset)}) == 100_004
    shares = [round(100 * levels[level] / total, 1) for level in (LIKED, NEUTRAL, DISLIKED)]
    assert shares == [51.6, 30.6, 17.8]


@needs_data
def test_amazon_instruments_have_their_published_counts() -> None:
    dataset = read_dataset("amazon", DATA / "amazon-musical-instruments")
    assert Counter(dataset.events["value"].to_pylist()) == {
        5.0: 6938,
        4.0: 2084,
        3.0: 772,
        2.0: 250,
        1.0: 217,
    }
    assert len(set(dataset.events["user_id"].to_pylist())) == 1429
