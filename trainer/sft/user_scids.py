"""Users' SCIDs for SFT: of every sample, the user as of its own position, worked out once a training.

The items before the target, the last 20, whole: an item that a step drops from the history the model reads
still counts here, so that the codes are the same in every epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from policies.codec import ScidCodec
from policies.prompt import HISTORY

from .data import Branches, IntArray, first_samples

CHUNK = 65_536
"""Samples whose histories are written out at once; bounds memory, changes nothing."""


@dataclass(frozen=True)
class UserScids:
    """The SCID of the user at every sample of the training histories."""

    codes: npt.NDArray[np.int32]
    """[samples, U]"""
    first: IntArray
    """[users], see ``data.first_samples``."""

    @classmethod
    def of(cls, codec: ScidCodec, histories: Sequence[IntArray]) -> "UserScids | None":
        """Code every position of ``histories`` (rows of the codec) but the first; none for a codec without
        SCIDs for users. Raises CodecError when the codec's user module cannot be used."""
        if not codec.user_sizes:
            return None
        lengths = np.array([len(history) for history in histories], dtype=np.int64)
        samples = np.maximum(lengths - 1, 0)
        first = first_samples(histories)
        items = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
        position = np.arange(samples.sum()) - np.repeat(first, samples) + 1
        end = np.repeat(np.cumsum(lengths) - lengths, samples) + position  # of each history, in ``items``
        codes = np.empty((len(position), len(codec.user_sizes)), dtype=np.int32)
        for start in range(0, len(codes), CHUNK):
            part = slice(start, start + CHUNK)
            codes[part] = codec.encode_user_rows(_before(items, end[part], position[part]))
        return cls(codes, first)

    def told(self, branches: Branches) -> Branches:
        """The same branches with the SCID of each sample's user."""
        return replace(branches, scids=self.codes[branches.samples_by(self.first)].astype(np.int64))


def _before(items: IntArray, end: IntArray, position: IntArray) -> IntArray:
    """int64 [n, 20]: the last 20 of the ``position`` items that end at ``end``, -1 behind fewer."""
    count = np.minimum(position, HISTORY)
    place = np.arange(HISTORY)
    there = place < count[:, None]
    at = np.where(there, (end - count)[:, None] + place, 0)
    return np.where(there, items[at], -1)
