"""Grades of rejected items: how much of the chosen item's SCID they share, and which of a grade are taken.

By prefix a rejected item's grade is the number of *leading* codes it shares with the chosen one: none is
easy, one medium, two or more hard; all of them would be the chosen item itself, which is no rejected item.
A code that agrees behind one that differs counts for nothing: level-k codebooks hold what the codes before
them left over.

By similarity it is the cosine of the two items' code vectors, an item's being the sum of its codes'
codebook vectors (what the quantizer decodes an SCID to), less the mean of all items.

Everything here is arrays of codec rows: N chosen items with K candidates each, -1 where there is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from features.errors import BadInput
from policies.codec import ScidCodec
from policies.quantizer import Quantizer
from policies.trie import ScidTrie
from trainer.errors import TrainerError
from trainer.settings import SelfPlaySettings

Grade = Literal["easy", "medium", "hard"]
GRADES: tuple[Grade, ...] = ("easy", "medium", "hard")
"""A grade's number is its place here."""

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Primes above any catalogue: i -> (start + i * prime) mod n meets every number below n once.
_PRIMES = np.array([2_147_483_647, 2_147_483_629, 2_147_483_587, 2_147_483_579, 2_147_483_563])


class NoCodeVectors(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """Grading by similarity needs the quantizer, which this codec does not hold."""


def common_prefix(codes: npt.NDArray[np.integer], chosen: IntArray, others: IntArray) -> IntArray:
    """[N, K] leading codes that ``others`` [N, K] share with ``chosen`` [N]; ``codes`` [n_items, L].

    What is said of a place with -1 means nothing.
    """
    same = codes[others] == codes[chosen][:, None, :]
    shared: IntArray = np.logical_and.accumulate(same, axis=2).sum(axis=2)
    return shared


@dataclass(frozen=True)
class Grader:
    """Grades candidates, and takes or adds those of one grade."""

    codec: ScidCodec
    trie: ScidTrie
    settings: SelfPlaySettings
    vectors: npt.NDArray[np.float32] | None = None
    """[n_items, z] code vectors of length 1; none: grades are by prefix."""

    @classmethod
    def of(cls, codec: ScidCodec, trie: ScidTrie, settings: SelfPlaySettings) -> "Grader":
        """Raises NoCodeVectors where settings ask for similarity and the codec cannot tell it."""
        by_prefix = settings.grading == "prefix"
        return cls(codec, trie, settings, None if by_prefix else code_vectors(codec))

    def grades(self, chosen: IntArray, candidates: IntArray) -> npt.NDArray[np.int8]:
        """int8 [N, K]: the grade of each candidate; -1 for none, or for the chosen item itself."""
        if self.vectors is None:
            found = np.minimum(common_prefix(self.codec.codes, chosen, candidates), len(GRADES) - 1)
        else:
            cosine = np.einsum("nz,nkz->nk", self.vectors[chosen], self.vectors[candidates])
            found = np.digitize(cosine, self.settings.similarity)
        usable = (candidates >= 0) & (candidates != chosen[:, None])
        return np.where(usable, found, -1).astype(np.int8)

    def rejected(
        self,
        grade: Grade,
        chosen: IntArray,
        candidates: IntArray,
        not_these: IntArray,
        random: np.random.Generator,
    ) -> tuple[IntArray, IntArray]:
        """The rejected items of one grade for each chosen one, and how many of them the trie added.

        ``chosen`` [N]; ``candidates`` [N, K], the policy's best first; ``not_these`` [N, S]: items that are
        no rejected ones, -1 fills. Returns int64 [N, R] (-1 fills, no item twice in a row) and [N].
        """
        wanted = self.settings.rejected
        usable = self.grades(chosen, candidates) == GRADES.index(grade)
        keys = np.broadcast_to(np.arange(candidates.shape[1]), candidates.shape).astype(np.float64)
        if self.settings.negatives == "stochastic":
            keys = random.random(candidates.shape)
        taken = _first(candidates, usable, keys, wanted)
        added = np.zeros(len(chosen), dtype=np.int64)
        if self.settings.fill == "none" or self.vectors is not None:
            return taken, added
        short = np.flatnonzero((taken >= 0).sum(axis=1) < wanted)
        if not len(short):
            return taken, added
        more = self._siblings(grade, chosen[short], 3 * wanted, random)
        left_out = np.concatenate([not_these[short], taken[short], chosen[short, None]], axis=1)
        usable = (more >= 0) & ~_among(more, left_out)
        both = np.concatenate([taken[short], more], axis=1)
        usable = np.concatenate([taken[short] >= 0, usable], axis=1)
        filled = _first(both, usable, np.broadcast_to(np.arange(both.shape[1]), both.shape), wanted)
        added[short] = (filled >= 0).sum(axis=1) - (taken[short] >= 0).sum(axis=1)
        taken[short] = filled
        return taken, added

    def _siblings(self, grade: Grade, chosen: IntArray, count: int, random: np.random.Generator) -> IntArray:
        """[N, count] different items of this grade, at random from the trie; -1 where there are fewer.

        The items of a grade are the leaves below a prefix of the chosen SCID less those below a longer one:
        two ranges, walked from a random start in steps of a random prime.
        """
        depth = GRADES.index(grade)
        leaf = self.trie.leaf_of_item[chosen].astype(np.int64)
        first, last = self._below(depth, leaf)
        inner_first, inner_last = self._below(depth + 1, leaf)
        if grade == "hard":  # two codes or more: nothing but the chosen item is inside
            inner_first, inner_last = leaf, leaf + 1
        size = (last - first) - (inner_last - inner_first)
        start = random.integers(0, np.maximum(size, 1))
        step = _PRIMES[random.integers(0, len(_PRIMES), size=len(chosen))]
        walk = np.arange(count)
        place = (start[:, None] + walk * step[:, None]) % np.maximum(size, 1)[:, None]
        found = first[:, None] + place
        found += np.where(found >= inner_first[:, None], (inner_last - inner_first)[:, None], 0)
        there = walk < size[:, None]
        items: IntArray = self.trie.item_of_leaf[np.where(there, found, 0)].astype(np.int64)
        return np.where(there, items, -1)

    def _below(self, depth: int, leaf: IntArray) -> tuple[IntArray, IntArray]:
        """The range of leaves that share the first ``depth`` codes with each ``leaf``."""
        if depth == 0:
            return np.zeros_like(leaf), np.full_like(leaf, len(self.trie.item_of_leaf))
        starts = self.trie.levels[min(depth, len(self.trie.levels)) - 1].first_leaf.astype(np.int64)
        node = np.searchsorted(starts, leaf, side="right") - 1
        return starts[node], starts[node + 1]


def code_vectors(codec: ScidCodec) -> npt.NDArray[np.float32]:
    """[n_items, z]: the sum of each item's codebook vectors, less the mean item's, of length 1.

    What all items have in common says nothing of two of them: with it, half of all pairs of Beauty have a
    cosine above .78. A disambiguating level that the quantizer does not have is left out.
    Raises NoCodeVectors.
    """
    if codec.source is None or not codec.can_grow:
        raise NoCodeVectors(
            "this codec holds no quantizer, so its SCIDs have no vectors: set "
            "trainer.curriculum.selfplay.grading to prefix"
        )
    books = _codebooks(codec.source)
    total = np.sum([book[codec.codes[:, level]] for level, book in enumerate(books)], axis=0)
    total = total - total.mean(axis=0)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (total / np.maximum(length, 1e-12)).astype(np.float32)
    return unit


def _codebooks(directory: Path) -> Sequence[npt.NDArray[np.float32]]:
    return Quantizer.load(directory / "quantizer").codebooks


def _first(items: IntArray, usable: BoolArray, keys: npt.NDArray[np.number], count: int) -> IntArray:
    """[N, count]: of each row the usable items with the least keys, in that order; -1 fills."""
    order = np.argsort(np.where(usable, keys, np.inf), axis=1, kind="stable")[:, :count]
    there = np.take_along_axis(usable, order, axis=1)
    taken = np.where(there, np.take_along_axis(items, order, axis=1), -1)
    if taken.shape[1] < count:
        taken = np.pad(taken, ((0, 0), (0, count - taken.shape[1])), constant_values=-1)
    return taken


def _among(items: IntArray, others: IntArray) -> BoolArray:
    """[N, K] whether each of ``items`` [N, K] is in the same row of ``others`` [N, S]."""
    width = int(max(items.max(initial=0), others.max(initial=0))) + 2
    offset = np.arange(len(items))[:, None] * width + 1
    found: BoolArray = np.isin(items + offset, others + offset)
    return found
