"""What every task is: wordings, which samples it can make, and how one is written.

A sample is a pure function of (seed, epoch, number): an epoch has an order of its own over all samples that
can be made, the same one again when it is through, and every number its own draws. Nothing behind a sample's
target is looked at: a history task sees ``Moment``, which holds what came before.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from policies.prompt import HISTORY
from trainer.sft.data import BoolArray, IntArray, first_samples
from trainer.sft.packing import TextSample
from trainer.sft.user_scids import UserScids

from .words import ItemWords
from .writing import Ids, Template, Writer


@dataclass(frozen=True)
class Moment:
    """One position of one history: what a prompt may know, and what came next."""

    before: list[int]
    """Rows of the items before, oldest first: the last HISTORY, at least one."""
    target: int
    user: Ids
    """Tokens of the user's SCID as of here; none for a codec without SCIDs for users."""


class Material:
    """What samples are made of: histories as rows of the codec, the catalogue's words, users' SCIDs."""

    def __init__(
        self, histories: Sequence[IntArray], words: ItemWords, writer: Writer, users: UserScids | None
    ) -> None:
        """``users``: of the same histories; none for a codec without SCIDs for users."""
        self.words, self.writer, self.users = words, writer, users
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        samples = np.maximum(lengths - 1, 0)
        self._items = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
        self._position = np.arange(samples.sum()) - np.repeat(first_samples(histories), samples) + 1
        self._end = np.repeat(np.cumsum(lengths) - lengths, samples) + self._position

    @property
    def moments(self) -> int:
        """Positions of all histories with at least one item before them, numbered as by first_samples."""
        return len(self._position)

    def moment(self, number: int) -> Moment:
        """The ``number``-th of them."""
        end = int(self._end[number])
        start = end - min(int(self._position[number]), HISTORY)
        user = () if self.users is None else self.writer.user(self.users.codes[number].tolist())
        return Moment(self._items[start:end].tolist(), int(self._items[end]), user)

    def with_target(self, able: Sequence[bool]) -> BoolArray:
        """[moments] whether the target is an item (row) of ``able``."""
        found: BoolArray = np.asarray(able, dtype=np.bool_)[self._items[self._end]]
        return found

    def with_history(self, able: Sequence[bool]) -> BoolArray:
        """[moments] whether an item of the history that a prompt shows is."""
        known = np.concatenate([[0], np.cumsum(np.asarray(able, dtype=np.bool_)[self._items])])
        start = self._end - np.minimum(self._position, HISTORY)
        return np.asarray(known[self._end] > known[start])


class Task(ABC):
    """A kind of sample. Subclasses say what it is made of; ``draw`` is the sampler."""

    name: ClassVar[str]
    """As in settings."""
    does: ClassVar[str]
    """In a few words, for people."""
    lacks: ClassVar[str]
    """What there is none of where no sample can be made, and what to do about it."""
    templates: ClassVar[tuple[Template, ...]]

    def __init__(self, material: Material) -> None:
        self.material, self.words, self.writer = material, material.words, material.writer
        self.possible = self._possible()
        """bool [candidates]: which samples can be made; the others lack text or an SCID."""
        self._ordered = lru_cache(maxsize=2)(self._order)

    @property
    def samples(self) -> int:
        """Samples that can be made, each in any of the wordings."""
        return int(self.possible.sum())

    @property
    def skipped(self) -> int:
        """Samples that cannot, for want of text."""
        return len(self.possible) - self.samples

    def draw(self, seed: int, epoch: int, number: int) -> TextSample:
        """The ``number``-th sample of an epoch. Needs at least one that can be made."""
        order = self._ordered(seed, epoch)
        rng = np.random.default_rng([seed, epoch, self._stream, number])
        return self.write(int(order[number % len(order)]), rng)

    @abstractmethod
    def write(self, candidate: int, rng: np.random.Generator) -> TextSample:
        """One sample of a candidate that is possible; ``rng`` picks the wording and whatever varies."""

    @abstractmethod
    def _possible(self) -> BoolArray: ...

    def _form(self, rng: np.random.Generator, *available: str) -> Template:
        """A wording, of those that need no other slots than ``available``."""
        forms = [form for form in self.templates if form.slots <= {*available}]
        return forms[int(rng.integers(len(forms)))]

    @property
    def _stream(self) -> int:
        return zlib.crc32(self.name.encode())

    def _order(self, seed: int, epoch: int) -> IntArray:
        order: IntArray = np.random.default_rng([seed, epoch, self._stream]).permutation(
            np.flatnonzero(self.possible)
        )
        return order


class HistoryTask(Task):
    """A task whose candidates are the moments of the histories."""

    def _asked(
        self,
        form: Template,
        moment: Moment,
        answer: Ids,
        history: Sequence[Ids],
        *,
        between: Ids = (),
        fill: Mapping[str, Ids] | None = None,
    ) -> TextSample:
        """``form`` with the shown history and the user's SCID."""
        shown = history if "history" in form.slots else ()
        user = moment.user if "history" in form.slots else ()
        return self.writer.sample(form, answer, fill=fill or {}, history=shown, between=between, user=user)

    def _items(self, moment: Moment, rng: np.random.Generator) -> list[Ids]:
        """The history as the product's prompt shows it; what has a token of its own is spelled as often."""
        return [self.writer.item(row, rng, self.writer.spell_items) for row in moment.before]
