"""What tokenization and SFT start from: the catalogue and every user's history, at one version of the log."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from features.catalogue import Catalogue
from features.duck import connect
from features.histories import histories
from features.levels import Level
from features.log import FeedbackLog, LogMissing, LogSnapshot
from features.settings import FeatureSettings

from .errors import CannotTrain


@dataclass(frozen=True)
class TrainingInput:
    """One reading of the store."""

    items: pa.Table
    """The catalogue (features.catalogue.CATALOGUE_SCHEMA), delisted items too: histories hold them."""
    histories: list[list[str]]
    """Item ids that each user engaged with and does not dislike now, oldest first; an entry a user, by id."""
    popularity: list[str]
    """Item ids, most liked first."""
    log_version: int | None
    """Version of the feedback log; none when there is no log."""
    watermark: datetime | None


def read_training_input(
    home: Path, settings: FeatureSettings, *, before: datetime | None = None, need_feedback: bool = True
) -> TrainingInput:
    """Catalogue and histories under ``home``, only what occurred ``before`` when given.

    Raises CatalogueMissing, CannotTrain for an empty catalogue and, where ``need_feedback``, LogMissing or
    CannotTrain when nobody engaged with anything.
    """
    items = Catalogue.open(home / "catalogue", create=False).items(listed_only=False)
    if items.num_rows == 0:
        raise CannotTrain("the catalogue is empty; load items with `align3gr catalogue load FILE`")
    try:
        snapshot = FeedbackLog.open(home / "log", create=False).snapshot()
    except LogMissing:
        if need_feedback:
            raise
        return TrainingInput(items, [], [], None, None)
    found = pa.table({"item_ids": [], "levels": []})
    if snapshot.files:
        with connect(settings) as con:
            found = histories(con, snapshot, settings, before=before)
    if found.num_rows == 0 and need_feedback:
        raise CannotTrain(
            "the feedback log holds no engagement yet (likes, clicks, ratings, purchases); "
            "publish feedback and run `align3gr ingest`, or replay a dataset"
        )
    sequences = found.column("item_ids").to_pylist()
    levels = found.column("levels").to_pylist()
    return TrainingInput(
        items,
        [without_disliked(ids, marks) for ids, marks in zip(sequences, levels, strict=True)],
        most_liked(sequences, levels),
        snapshot.version,
        snapshot.watermark,
    )


def training_histories(
    snapshot: LogSnapshot, settings: FeatureSettings, user_ids: Sequence[str] | None = None
) -> dict[str, list[str]]:
    """User -> what they engaged with and do not dislike at ``snapshot``, oldest first; by user id."""
    if not snapshot.files:
        return {}
    with connect(settings) as con:
        found = histories(con, snapshot, settings, user_ids=user_ids)
    columns = (found.column(name).to_pylist() for name in ("user_id", "item_ids", "levels"))
    return {user: without_disliked(items, marks) for user, items, marks in zip(*columns, strict=True)}


def without_disliked(items: Sequence[str], levels: Sequence[int | None]) -> list[str]:
    """A history without what the user came to dislike after engaging with it: no next item to teach."""
    return [item for item, level in zip(items, levels, strict=True) if level != Level.DISLIKED]


def most_liked(histories: Sequence[Sequence[str]], levels: Sequence[Sequence[int | None]]) -> list[str]:
    """Items by number of users who like them, then by number who engaged with them; ties alphabetical."""
    liked: Counter[str] = Counter()
    met: Counter[str] = Counter()
    for items, marks in zip(histories, levels, strict=True):
        met.update(items)
        liked.update(item for item, level in zip(items, marks, strict=True) if level == Level.LIKED)
    return sorted(met, key=lambda item: (-liked[item], -met[item], item))
