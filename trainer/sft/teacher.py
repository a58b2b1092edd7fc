"""A collaborative teacher for SFT, distilled as soft targets: sequential rules, and SASRec beside them.

After a history the teacher's distribution over items is

    t(j) = sigma · p_SASRec(j) + (1 - sigma) · s(j) / sum(s),    0 for j already in the history,

with s of ``trainer.sft.rules`` and p of ``trainer.sft.sasrec``, each scaled to sum to 1 over items not in the
history (a history that the rules know nothing of has SASRec's alone). The student's target is the mixture
q = (1 - w) · [the item that came next] + w · t. Its cross-entropy is taken exactly at the first code and, for
one item y drawn from q, exactly at every further code given the codes of y before it: an unbiased estimate of
the cross-entropy over items, at the price of one answer.

What a user's own history adds to the rules is subtracted where that user is taught (leave one out): the
teacher would otherwise quote the answer. SASRec has seen the answers too, but through dropout and held-out
users it learns little by heart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .data import Branches, first_samples
from .rules import RECENT, WINDOW, Rules
from .sasrec import SasRec

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

AT_ONCE = 512
"""Positions that SASRec is asked about at once; bounds memory, changes nothing."""

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
        *,
        keep: int,
        weight: float,
        sasrec: SasRec | None = None,
        sigma: float = 0.0,
        progress: Progress | None = None,
    ) -> "Teacher":
        """Count the rules of ``histories`` and ask them, and ``sasrec`` with the share ``sigma``, about each
        of their positions but the first."""
        rules = Rules.fit(histories, n_items)
        first = first_samples(histories)
        count = sum(max(len(history) - 1, 0) for history in histories)
        items = np.full((count, keep), -1, dtype=np.int32)
        shares = np.zeros((count, keep), dtype=np.float32)
        opinions = (
            _by_rules(histories, rules)
            if sasrec is None or sigma == 0
            else _by_both(histories, rules, sasrec, sigma)
        )
        for sample, (columns, scores) in enumerate(opinions):
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


def _by_rules(
    histories: Sequence[IntArray], rules: Rules
) -> Iterator[tuple[IntArray, npt.NDArray[np.float64]]]:
    """(items, scores) of each position of each history but the first, in order; items already met score 0."""
    for history in histories:
        if len(history) < 2:
            continue
        columns, weights = _votes(history, rules)
        where = np.searchsorted(columns, history)
        for position in range(1, len(history)):
            voting = np.arange(max(0, position - RECENT), position)
            scores = (weights[voting] / (position - voting)[:, None]).sum(axis=0)
            known = where[:position]
            inside = known < len(columns)
            scores[known[inside][columns[known[inside]] == history[:position][inside]]] = 0.0
            yield columns, scores


def _votes(history: IntArray, rules: Rules) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """(items [C], votes of each position but the last for them [len - 1, C]), the history's own part out."""
    found = rules.counts[history[:-1]]  # a row an item that votes
    columns, place = np.unique(found.indices, return_inverse=True)
    voters = np.repeat(np.arange(len(history) - 1), np.diff(found.indptr))
    weights = np.zeros((len(history) - 1, len(columns)))
    weights[voters, place] = found.data
    where = np.searchsorted(columns, history)
    # What this history itself put there: 1/(b - a) for each of its pairs a < b.
    for a in range(len(history) - 1):
        b = np.arange(a + 1, min(a + WINDOW, len(history) - 1) + 1)
        np.subtract.at(weights[a], where[b], 1.0 / (b - a))
    weights = np.maximum(weights, 0.0) * rules.damp[history[:-1]][:, None]
    weights[weights < 1e-9] = 0.0  # rounding of the subtraction
    return columns.astype(np.int64), weights


def _by_both(
    histories: Sequence[IntArray], rules: Rules, sasrec: SasRec, sigma: float
) -> Iterator[tuple[IntArray, npt.NDArray[np.float64]]]:
    """As ``_by_rules``, with t over all items."""
    asked = [history[:end] for history in histories for end in range(1, len(history))]
    by_rules = _by_rules(histories, rules)
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        told = np.exp(sasrec.log_probs(part))
        every = np.arange(told.shape[1])
        for row, history in zip(told, part, strict=True):
            row[history] = 0.0
            mixed = row / max(float(row.sum()), 1e-30)
            columns, scores = next(by_rules)
            total = float(scores.sum())
            if total > 0:
                mixed *= sigma
                mixed[columns] += (1 - sigma) * scores / total
            yield every, mixed.astype(np.float64)


def _largest(scores: npt.NDArray[np.float64], keep: int) -> IntArray:
    """Places of the ``keep`` largest positive scores, largest first, ties by place."""
    places = np.flatnonzero(scores > 0)
    if len(places) > keep:
        least = np.partition(scores[places], -keep)[-keep]
        places = places[scores[places] >= least]
    return places[np.argsort(-scores[places], kind="stable")][:keep]
