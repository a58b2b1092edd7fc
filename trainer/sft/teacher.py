"""A teacher for SFT, distilled as soft targets: SASRec, sequential rules, shared users, like texts.

After a history the teacher's distribution over items is

    t(j) = sum_k sigma_k · p_k(j),    0 for j already in the history,

with p_k of ``trainer.sft.sasrec`` and ``trainer.sft.votes``, each scaled to sum to 1 over items not in the
history; a part that knows nothing of a history leaves its share to the others. The student's target is
q = (1 - w) · [the item that came next] + w · t. Its cross-entropy is taken exactly at the first code and, for
one item y drawn from q, exactly at every further code given the codes of y before it: an unbiased estimate of
the cross-entropy over items, at the price of one answer.

What a user's own history adds to the votes is subtracted where that user is taught (leave one out): the
teacher would otherwise quote the answer. SASRec has seen the answers too, but through dropout and held-out
users it learns little by heart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from trainer.settings import TeacherShares

from .data import Branches, first_samples
from .sasrec import SasRec
from .votes import like_texts, sequential_rules, shared_users

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

Progress = Callable[[str, int, int, str], None]
"""Called with (what is being made, how much is done, of how much, a note)."""


class Part(Protocol):
    """What a teacher is made of: something that scores items after a history, 0 for what is in it."""

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """Of every item after each history: [n, n_items]."""
        ...

    def along(self, histories: Sequence[IntArray]) -> Iterator[tuple[IntArray, Doubles]]:
        """(items, their scores) at each position but the first of each training history, in order; an item
        that is not named scores 0."""
        ...


@dataclass(frozen=True)
class Teacher:
    """The teacher's opinion on every sample of the training histories."""

    items: npt.NDArray[np.int32]
    """[samples, M] item indices, heaviest first; -1 where there are fewer."""
    shares: FloatArray
    """[samples, M], rows sum to 1, or are 0 where the teacher knows nothing."""
    first: IntArray
    """[users]: sample of (user, position 1); position p is ``first[user] + p - 1``."""
    weight: float
    """w, the teacher's share of the target."""

    @classmethod
    def of(
        cls,
        histories: Sequence[IntArray],
        n_items: int,
        parts: Sequence[tuple[float, Part]],
        *,
        keep: int,
        weight: float,
        progress: Progress | None = None,
    ) -> "Teacher":
        """Ask ``parts``, each with its share of the teacher, about every position of ``histories`` but the
        first; their ``keep`` likeliest items stay."""
        first = first_samples(histories)
        count = sum(max(len(history) - 1, 0) for history in histories)
        items = np.full((count, keep), -1, dtype=np.int32)
        shares = np.zeros((count, keep), dtype=np.float32)
        weights = [share for share, _ in parts]
        asked = zip(*(part.along(histories) for _, part in parts), strict=True)
        for sample, opinions in enumerate(asked):
            columns, scores = _mixed(weights, opinions, n_items)
            best = _largest(scores, keep)
            items[sample, : len(best)] = columns[best]
            shares[sample, : len(best)] = scores[best] / max(scores[best].sum(), 1e-30)
            if progress is not None and sample % 4096 == 0:
                progress("teacher", sample, count, "")
        return cls(items, shares, first, weight)

    def as_state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it; ``of_state`` makes it again."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ("items", "shares", "first")}

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor], weight: float) -> "Teacher":
        """The teacher of which ``state`` was kept."""
        return cls(state["items"].numpy(), state["shares"].numpy(), state["first"].numpy(), weight)

    def blend(self, branches: Branches, rng: np.random.Generator) -> Branches:
        """Answers drawn from q, with q itself as ``candidates`` and ``shares``; -1 answers stay."""
        rows, most = branches.answers.shape
        sample = branches.samples_by(self.first)
        real = branches.answers >= 0
        told = self.shares[sample]  # [B, maxb, M]
        w = np.where(told.sum(axis=2) > 0, self.weight, 0.0)[..., None]
        shares = np.concatenate([1 - w, w * told], axis=2).astype(np.float32)
        candidates = np.concatenate([branches.answers[..., None], self.items[sample]], axis=2)
        summed = shares.cumsum(axis=2)
        drawn = rng.random((rows, most, 1)) * summed[..., -1:] < summed
        answers = np.take_along_axis(candidates, drawn.argmax(axis=2)[..., None], axis=2)[..., 0]
        return replace(
            branches,
            answers=np.where(real, answers, -1),
            candidates=np.where(real[..., None] & (shares > 0), candidates, -1),
            shares=np.where(real[..., None], shares, 0.0).astype(np.float32),
        )


def parts_of(
    shares: TeacherShares,
    histories: Sequence[IntArray],
    n_items: int,
    *,
    texts: Sequence[str],
    sasrec: Callable[[], SasRec],
) -> list[tuple[float, Part]]:
    """(its share, the part) of each part of the teacher of ``histories`` that has a share. ``texts``: one an
    item; ``sasrec``: trains it, called only where it is wanted."""
    made: tuple[tuple[float, Callable[[], Part]], ...] = (
        (shares.sasrec, sasrec),
        (shares.rules, lambda: sequential_rules(histories, n_items)),
        (shares.users, lambda: shared_users(histories, n_items)),
        (shares.texts, lambda: like_texts(texts)),
    )
    return [(share, make()) for share, make in made if share > 0]


def _mixed(
    weights: Sequence[float], opinions: Sequence[tuple[IntArray, Doubles]], n_items: int
) -> tuple[IntArray, Doubles]:
    """(items, t of them, up to a factor that is the same for all)."""
    told = [
        (weight / total, columns, scores)
        for weight, (columns, scores) in zip(weights, opinions, strict=True)
        if (total := scores.sum()) > 0
    ]
    dense = any(len(columns) == n_items for _, columns, _ in told)
    every = (
        np.arange(n_items)
        if dense
        else np.unique(np.concatenate([np.zeros(0, np.int64), *(columns for _, columns, _ in told)]))
    )
    mixed = np.zeros(len(every))
    for weight, columns, scores in told:
        mixed[columns if dense else np.searchsorted(every, columns)] += weight * scores
    return every, mixed


def _largest(scores: Doubles, keep: int) -> IntArray:
    """Places of the ``keep`` largest positive scores, largest first, ties by place."""
    places = np.flatnonzero(scores > 0)
    if len(places) > keep:
        least = np.partition(scores[places], -keep)[-keep]
        places = places[scores[places] >= least]
    return places[np.argsort(-scores[places], kind="stable")][:keep]
