"""The trie of valid SCIDs, as sorted arrays: what may follow a prefix, and how many items lie below it.

Sorted by code, the items below any node are one contiguous range of leaves, and the children of any node are
one contiguous range of the next level's nodes. So a level is three arrays (first child, code, first leaf)
whatever the codebooks' sizes: a million items take 20 MB, where a dense ``next[node, code]`` of the last
level takes 65,536 x 256 x 4 bytes = 67 MB, and 1 GB with a disambiguating fourth level. And counting a node's
items, also without some that are left out, is a difference of two prefix sums.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .codec import ScidCodec

Index = NDArray[np.int32]


@dataclass(frozen=True)
class Level:
    """The nodes reached by one more code; ``n`` of them, in lexicographic order of their prefix."""

    code: Index
    """[n] the code that leads here from the parent."""
    first_leaf: Index
    """[n + 1] leaves first_leaf[i] .. first_leaf[i + 1] lie below node i."""
    first_child: Index
    """[m + 1] over the m parents: their children are nodes first_child[p] .. first_child[p + 1] here."""
    widest: int
    """The most children a parent has."""


@dataclass(frozen=True)
class ScidTrie:
    """One level for each code of an SCID, and the item row of each leaf. Invariant: one leaf is one item."""

    levels: tuple[Level, ...]
    item_of_leaf: Index
    """[n_items] row of the codec, in lexicographic order of the SCIDs."""
    leaf_of_item: Index
    """[n_items] the inverse."""

    @classmethod
    def of(cls, codec: ScidCodec) -> "ScidTrie":
        """Build it; O(n log n), about a second for a million items."""
        codes = codec.codes
        order = np.lexsort(codes.T[::-1]).astype(np.int32)
        ordered = codes[order]
        n_items, depth = codes.shape
        levels = []
        starts_parent = np.array([0], dtype=np.int64)
        changed = np.zeros(n_items, dtype=bool)
        changed[:1] = True
        for level in range(depth):
            changed[1:] |= ordered[1:, level] != ordered[:-1, level]
            starts = np.flatnonzero(changed)
            first_child = np.searchsorted(starts, [*starts_parent, n_items]).astype(np.int32)
            levels.append(
                Level(
                    code=ordered[starts, level].astype(np.int32),
                    first_leaf=np.append(starts, n_items).astype(np.int32),
                    first_child=first_child,
                    widest=int(np.diff(first_child).max(initial=0)),
                )
            )
            starts_parent = starts
        leaf_of_item = np.empty(n_items, dtype=np.int32)
        leaf_of_item[order] = np.arange(n_items, dtype=np.int32)
        return cls(tuple(levels), order, leaf_of_item)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """The codes that may follow a prefix, ascending; empty for a prefix no item has."""
        node = 0
        for depth, code in enumerate(prefix):
            children = self._children(depth, node)
            at = int(np.searchsorted(self.levels[depth].code[children], code))
            if at == children.stop - children.start or self.levels[depth].code[children][at] != code:
                return []
            node = children.start + at
        if len(prefix) == len(self.levels):
            return []
        return [int(code) for code in self.levels[len(prefix)].code[self._children(len(prefix), node)]]

    def alive(self, eligible: NDArray[np.bool_] | None) -> Index:
        """[n_items + 1] prefix sums over leaves of eligible items; ``eligible`` [n_items] is by codec row."""
        ones = (
            np.ones(len(self.item_of_leaf), dtype=bool) if eligible is None else eligible[self.item_of_leaf]
        )
        return np.concatenate([[0], np.cumsum(ones)]).astype(np.int32)

    def leaves(self, rows: Collection[int]) -> Index:
        """Sorted leaves of codec rows."""
        return np.sort(self.leaf_of_item[np.fromiter(rows, dtype=np.int64, count=len(rows))])

    @property
    def bytes(self) -> int:
        """Memory of the arrays."""
        arrays = [self.item_of_leaf, self.leaf_of_item]
        arrays += [a for level in self.levels for a in (level.code, level.first_leaf, level.first_child)]
        return sum(array.nbytes for array in arrays)

    def _children(self, depth: int, node: int) -> slice:
        first = self.levels[depth].first_child
        return slice(int(first[node]), int(first[node + 1]))
