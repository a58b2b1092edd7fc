"""What a benchmark of preference training learns from: bare sequences, or ratings with levels.

Of every user the last item is the test item and the one before it the validation item; nothing learns from
either, or from anything that the user did after them. The items in front of these are *fresh*: SFT has not
seen them, preference training learns from them. So it is in production, where a policy meets feedback that
came after it. With one item held back instead of two the validation item is the fresh one: what a policy that
was trained on the paper's split has not seen.

Ratings go through the product's own path (importer, levels, feedback log, preference dataset). A history is
then what the user engaged with (liked or neutral), and the test item is the last one that the user liked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from benchmarks.landing import land, rows_of
from features.catalogue import Item
from features.datasets import PreferenceDataset, TooFewLikes
from features.interactions import Interaction
from features.log import FeedbackLog
from features.settings import DatasetSettings, FeatureSettings
from ingest.importers.dataset import interactions
from ingest.importers.reading import read_dataset

from .reading import HELD_BACK, read

SFT_ENDED = datetime(2026, 1, 1, tzinfo=UTC)
"""When what SFT knows had landed; the rest lands a day later."""
DAY = timedelta(days=1)
FRESH_SHARE = 4
"""Of ratings the last one in so many of a user's training items is fresh."""
PER_USER = 10
"""Samples of a user in a stage at most, the latest likes: some users of MovieLens rated a thousand films."""
FEATURES = FeatureSettings(
    earliest_event=datetime(1990, 1, 1, tzinfo=UTC),
    dataset=DatasetSettings(min_samples=1, max_samples_per_user=PER_USER),
)
NO_LEVELS = "the data set has no feedback levels: no dislike, no impression"
TOO_FEW = "too few likes after which something was disliked or passed over"


@dataclass(frozen=True)
class Material:
    """A data set, cut."""

    name: str
    items: pa.Table
    """item_id, title, categories, text."""
    histories: Mapping[str, Sequence[str]]
    """User -> items, oldest first; the last one is the test item, the one before it the validation item."""
    known: Mapping[str, int]
    """User -> leading items of the history that SFT may see."""
    held_back: int = HELD_BACK
    """Items at a history's end that nothing learns from."""
    met: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """User -> what was rated before the test item, where that is more than the history."""
    past: Sequence[Interaction] = ()
    fresh: Sequence[Interaction] = ()
    """Feedback before the validation items: of what SFT may see, and after it. None: no levels."""

    def seen(self, user: str, back: int) -> frozenset[str]:
        """What a list leaves out when the item ``back`` from the end is to be found."""
        before = frozenset(self.histories[user][:-back])
        return self.met.get(user, before) if back == 1 else before

    @cached_property
    def sft_histories(self) -> list[list[str]]:
        """What a base policy is trained on."""
        return [list(items[: self.known[user]]) for user, items in self.histories.items()]

    @property
    def leave_out(self) -> int:
        """The fewest items of a history that SFT does not see."""
        return min(len(items) - self.known[user] for user, items in self.histories.items())

    def feedback(self, place: Path) -> dict[str, pa.Table]:
        """Samples of the stages easy and hard, chosen from fresh likes; built at ``place``. None of either
        where there are no levels, or no negatives."""
        if not self.fresh:
            return {}
        if not (place / "log").is_dir():
            land(place / "log", self.past, FEATURES, SFT_ENDED)
            land(place / "log", self.fresh, FEATURES, SFT_ENDED + DAY)
        snapshot = FeedbackLog.open(place / "log", create=False).snapshot()
        try:
            found = PreferenceDataset.build(snapshot, FEATURES, place / "datasets", since=SFT_ENDED + DAY / 2)
        except TooFewLikes:
            return {}
        return {stage: found.stage(stage) for stage in ("easy", "hard")}


def material(folder: Path, fresh: int, held_back: int = HELD_BACK) -> Material:
    """``sequences.jsonl.gz`` and ``items.jsonl.gz``, or ratings in a published format (MovieLens, Amazon).
    ``held_back``: items at each user's end that nothing learns from; ``fresh``: of bare sequences, items in
    front of those that SFT does not see."""
    name = folder.resolve().name
    if not (folder / "sequences.jsonl.gz").is_file():
        return _rated(folder, name, held_back)
    data = read(folder)
    split = zip(data.histories, data.targets, strict=True)
    histories = {str(user): [*map(str, before), str(last)] for user, (before, last) in enumerate(split)}
    known = {user: max(len(items) - held_back - fresh, 1) for user, items in histories.items()}
    return Material(name, data.items, histories, known, held_back)


def _rated(folder: Path, name: str, held_back: int) -> Material:
    source = "movielens" if any(folder.glob("ratings.*")) or (folder / "u.data").is_file() else "amazon"
    data = read_dataset(source, folder)
    events = list(interactions(data.events, data.source))
    levels = rows_of(events, FEATURES, SFT_ENDED)["level"].to_pylist()
    streams: dict[str, list[tuple[Interaction, int]]] = {}
    for event, level in zip(events, levels, strict=True):
        streams.setdefault(event.user_id, []).append((event, level))
    histories, known, met = {}, {}, {}
    past: list[Interaction] = []
    fresh: list[Interaction] = []
    for user, stream in streams.items():
        liked = [place for place, (_, level) in enumerate(stream) if level == 1]
        engaged = [place for place in range(liked[-1] + 1) if stream[place][1] >= 0] if liked else []
        training = engaged[:-held_back]
        if not training:
            continue
        told = max(len(training) - max(len(training) // FRESH_SHARE, 1), 1)
        histories[user] = [stream[place][0].item_id for place in engaged]
        known[user] = told
        met[user] = frozenset(event.item_id for event, _ in stream[: engaged[-1]])
        edge = training[told] if told < len(training) else engaged[-held_back]
        past += [event for event, _ in stream[:edge]]
        fresh += [event for event, _ in stream[edge : engaged[-held_back]]]
    return Material(name, _table(data.items, streams), histories, known, held_back, met, past, fresh)


def _table(items: Sequence[Item], streams: Mapping[str, Sequence[tuple[Interaction, int]]]) -> pa.Table:
    of = {item.item_id: item for item in items}
    ids = sorted({event.item_id for stream in streams.values() for event, _ in stream})
    found = [of.get(item, Item(item_id=item)) for item in ids]
    return pa.table(
        {
            "item_id": ids,
            "title": [item.title for item in found],
            "categories": pa.array([list(item.categories) for item in found], pa.list_(pa.string())),
            "text": [item.text for item in found],
        }
    )
