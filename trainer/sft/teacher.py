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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .data import Branches, first_samples
from .sasrec import SasRec
from .votes import Votes

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

AT_ONCE = 512
"""Positions that SASRec is asked about at once; bounds memory, changes nothing."""

Part = tuple[float, IntArray, npt.NDArray[np.float64]]
"""(share, items, their scores, which sum to 1) of one kind of votes after a history."""

Progress = Callable[[int, int], None]
"""Called with (positions done, positions in all)."""


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
        votes: Sequence[tuple[float, Votes]],
        *,
        keep: int,
        weight: float,
        sasrec: tuple[float, SasRec] | None = None,
        progress: Progress | None = None,
    ) -> "Teacher":
        """Ask ``votes`` and ``sasrec``, each with its share of the teacher, about every position of
        ``histories`` but the first; their ``keep`` likeliest items stay."""
        first = first_samples(histories)
        count = sum(max(len(history) - 1, 0) for history in histories)
        items = np.full((count, keep), -1, dtype=np.int32)
        shares = np.zeros((count, keep), dtype=np.float32)
        told = None if sasrec is None else _told(histories, *sasrec)
        for sample, voted in enumerate(_voted(histories, votes)):
            columns, scores = _mixed(voted, n_items, None if told is None else next(told))
            best = _largest(scores, keep)
            items[sample, : len(best)] = columns[best]
            shares[sample, : len(best)] = scores[best] / max(scores[best].sum(), 1e-30)
            if progress is not None and sample % 4096 == 0:
                progress(sample, count)
        return cls(items, shares, first, weight)

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


def _voted(histories: Sequence[IntArray], votes: Sequence[tuple[float, Votes]]) -> Iterator[list[Part]]:
    """What each of ``votes`` that knows something says at each position but the first, in order."""
    for history in histories:
        shares = [share for share, _ in votes]
        for opinions in zip(*(one.along(history) for _, one in votes), strict=True):
            yield [
                (share, columns, scores / scores.sum())
                for share, (columns, scores) in zip(shares, opinions, strict=True)
                if scores.sum() > 0
            ]


def _told(
    histories: Sequence[IntArray], sigma: float, sasrec: SasRec
) -> Iterator[tuple[float, npt.NDArray[np.float64]]]:
    """(its share, p over all items) of SASRec at the same positions."""
    asked = [history[:end] for history in histories for end in range(1, len(history))]
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        for row, history in zip(np.exp(sasrec.log_probs(part)), part, strict=True):
            row[history] = 0.0
            yield sigma, row.astype(np.float64) / max(float(row.sum()), 1e-30)


def _mixed(
    voted: Sequence[Part], n_items: int, told: tuple[float, npt.NDArray[np.float64]] | None
) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """(items, t of them, up to a factor that is the same for all)."""
    if told is not None:
        scores = told[0] * told[1]
        for share, own, votes in voted:
            scores[own] += share * votes
        return np.arange(n_items), scores
    columns = np.unique(np.concatenate([np.zeros(0, np.int64), *(own for _, own, _ in voted)]))
    scores = np.zeros(len(columns))
    for share, own, votes in voted:
        scores[np.searchsorted(columns, own)] += share * votes
    return columns, scores


def _largest(scores: npt.NDArray[np.float64], keep: int) -> IntArray:
    """Places of the ``keep`` largest positive scores, largest first, ties by place."""
    places = np.flatnonzero(scores > 0)
    if len(places) > keep:
        least = np.partition(scores[places], -keep)[-keep]
        places = places[scores[places] >= least]
    return places[np.argsort(-scores[places], kind="stable")][:keep]
