"""What tokenization and SFT read from the store."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from features.batch import InteractionBatch, Record
from features.catalogue import Catalogue, Item
from features.interactions import Interaction, Kind, encode_interaction
from features.log import FeedbackLog, LogMissing, offsets_app
from features.settings import FeatureSettings
from trainer.errors import CannotTrain
from trainer.training_input import most_liked, read_training_input

START = datetime(2026, 3, 1, tzinfo=UTC)


def make_home(home: Path, happened: list[tuple[str, str, Kind]]) -> Path:
    items = [Item(item_id=name, title=f"item {name}") for name in "abcd"]
    catalogue = Catalogue.open(home / "catalogue")
    catalogue.load(items, now=START)
    catalogue.delist(["d"], now=START)
    log = FeedbackLog.open(home / "log")
    if happened:
        batch = InteractionBatch.of(FeatureSettings())
        records = []
        for minute, (user, item, kind) in enumerate(happened):
            at = START + timedelta(minutes=minute)
            event = Interaction(event_id=f"e{minute}", user_id=user, item_id=item, kind=kind, occurred_at=at)
            records.append(Record(encode_interaction(event), 0, minute, int(at.timestamp() * 1000)))
        assert not batch.add(records, now=START + timedelta(days=1))
        app = offsets_app("test", "interactions", 0)
        assert log.transaction_version(app) is None
        log.append(batch.table(START + timedelta(days=1)), {app: len(records) - 1})
    return home


def test_histories_are_in_order_without_what_came_to_be_disliked(tmp_path: Path) -> None:
    home = make_home(
        tmp_path,
        [
            ("u", "a", Kind.LIKE), ("u", "b", Kind.CLICK), ("v", "b", Kind.LIKE), ("u", "d", Kind.LIKE),
            ("u", "a", Kind.DISLIKE), ("w", "c", Kind.IMPRESSION), ("v", "d", Kind.LIKE),
        ],
    )  # fmt: skip
    found = read_training_input(home, FeatureSettings())
    assert found.histories == [["b", "d"], ["b", "d"]]
    assert found.items["item_id"].to_pylist() == ["a", "b", "c", "d"]  # histories hold delisted items too
    assert found.popularity == ["d", "b", "a"]
    assert found.log_version == 1


def test_only_what_happened_before_is_read(tmp_path: Path) -> None:
    home = make_home(tmp_path, [("u", "a", Kind.LIKE), ("u", "b", Kind.LIKE), ("u", "c", Kind.LIKE)])
    before = START + timedelta(minutes=2)
    assert read_training_input(home, FeatureSettings(), before=before).histories == [["a", "b"]]


def test_an_empty_log_is_refused_where_feedback_is_needed(tmp_path: Path) -> None:
    home = make_home(tmp_path / "empty", [])
    with pytest.raises(CannotTrain, match="no engagement"):
        read_training_input(home, FeatureSettings())
    assert read_training_input(home, FeatureSettings(), need_feedback=False).histories == []

    Catalogue.open(tmp_path / "none" / "catalogue").load([Item(item_id="a", title="x")], now=START)
    with pytest.raises(LogMissing):
        read_training_input(tmp_path / "none", FeatureSettings())
    Catalogue.open(tmp_path / "bare" / "catalogue")
    with pytest.raises(CannotTrain, match="catalogue is empty"):
        read_training_input(tmp_path / "bare", FeatureSettings())


def test_popularity_counts_likes_before_meetings() -> None:
    histories = [["a", "b"], ["a"], ["b", "c"]]
    assert most_liked(histories, [[None, 1], [0], [None, 1]]) == ["b", "c", "a"]
