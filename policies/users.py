"""A user's SCID: what the user did so far, as codes, worked out when a prompt is written. Inference only.

Nothing is kept a user: the SCID is a pure function of the history before the prompt, so a user nobody met at
training time gets one too, and no prompt knows what came after it. The vector of a user is
``[semantic part | interest]``: the mean of the profile's lines (the text vector of each item of the history)
and DIN's attention-pooled interest in them. ``trainer.tokenization`` fits all of it.

A directory ``users`` inside a codec's ``quantizer`` directory::

    quantizer.json, quantizer.safetensors   see policies.quantizer
    attention.safetensors                   hidden, bias, out, offset (absent: the interest is a plain mean)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError
from .quantizer import Codes, Quantizer
from .text import Vectors, plain

MAX_HISTORY = 20
"""Items of a history that a user's vector is made of: those of a prompt."""

CHUNK = 256
"""Users worked on at once: what a cache holds (20,000 users of 448 columns took 1.5 s, by 2,048 3.7 s)."""

_ATTENTION = "attention.safetensors"


Histories = Sequence[NDArray[np.int64]] | NDArray[np.int64]
"""Item rows of each history, oldest first; or one int64 [n, H <= 20], -1 behind the shorter ones."""


@dataclass(frozen=True)
class ItemVectors:
    """What the users' side needs of every item of a codec, in the codec's order; float16 on disk.

    Raises CodecError for a value that is no number, or too large for float16: every user with that item in
    the history would have no SCID.
    """

    text: Vectors
    """[n_items, t]"""
    behaviour: Vectors
    """[n_items, d]; predicted from the text for an item nobody met."""

    def __post_init__(self) -> None:
        # A sum of float16 values fits float32, and is no number when one of them is none.
        if not np.isfinite(self.text.sum()) or not np.isfinite(self.behaviour.sum()):
            raise CodecError("the vector of an item holds a value that is not a number; fit the codec again")

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def of(cls, text: Vectors, behaviour: Vectors) -> "ItemVectors":
        """Rounded to float16, as a codec keeps them: the same numbers before and after saving."""
        return cls(_rounded(text), _rounded(behaviour))

    def joined(self, other: "ItemVectors") -> "ItemVectors":
        """These, then the other's. Raises CodecError for other widths."""
        if (self.text.shape[1], self.behaviour.shape[1]) != (other.text.shape[1], other.behaviour.shape[1]):
            raise CodecError("vectors of new items have another width than the codec's; fit it again")
        return ItemVectors(
            np.concatenate([self.text, other.text]), np.concatenate([self.behaviour, other.behaviour])
        )

    def save(self, file: Path) -> None:
        """Write one safetensors file."""
        from safetensors.numpy import save_file

        save_file({"text": _half(self.text), "behaviour": _half(self.behaviour)}, file)

    @classmethod
    def load(cls, file: Path) -> "ItemVectors":
        """Read what ``save`` wrote."""
        from safetensors.numpy import load_file

        tensors = load_file(file)
        return cls(tensors["text"].astype(np.float32), tensors["behaviour"].astype(np.float32))

    def as_bytes(self) -> bytes:
        """For a hash: shapes and float16 values."""
        shapes = f"{self.text.shape}{self.behaviour.shape}".encode()
        return shapes + _half(self.text).tobytes() + _half(self.behaviour).tobytes()


@dataclass(frozen=True)
class InterestAttention:
    """DIN's activation unit: how much a behaviour says about a target (Zhou et al., KDD 2018, section 4.3).

    ``a(h, t) = relu([h, t, h*t] W + b) . w + c``, not normalised over the history, as in the paper: the
    strength of an interest is kept. The paper's ``h - t`` is a linear function of h and t and adds nothing to
    the first layer.
    """

    hidden: Vectors
    """W [3d, m]"""
    bias: Vectors
    """b [m]"""
    out: Vectors
    """w [m]"""
    offset: Vectors
    """c [1]"""

    def weights(self, behaviours: Vectors, target: Vectors) -> Vectors:
        """[n, H, d], [n, d] -> [n, H]."""
        d = behaviours.shape[-1]
        of_history, of_target, of_both = self.hidden[:d], self.hidden[d : 2 * d], self.hidden[2 * d :]
        inner = behaviours @ of_history + (target @ of_target + self.bias)[:, None]
        inner += (behaviours * target[:, None]) @ of_both
        return np.asarray(np.maximum(inner, 0) @ self.out + self.offset, dtype=np.float32)


@dataclass(frozen=True)
class UserEncoder:
    """Histories in, users' codes out. Two users may share an SCID."""

    quantizer: Quantizer
    attention: InterestAttention | None = None

    def vectors(self, items: ItemVectors, histories: Histories) -> Vectors:
        """[n, t + d] of histories of item rows, oldest first; the last 20 count, an empty one gives zeros.

        The target of the attention is the latest behaviour: what the user is after now.
        """
        out = np.zeros((len(histories), items.text.shape[1] + items.behaviour.shape[1]), dtype=np.float32)
        for start in range(0, len(histories), CHUNK):
            rows = padded(histories[start : start + CHUNK])
            out[start : start + CHUNK] = pooled(items, self.attention, rows)
        return out

    def encode(self, items: ItemVectors, histories: Histories) -> Codes:
        """int32 [n, U] of histories of item rows, oldest first."""
        return self.quantizer.encode(self.vectors(items, histories))

    def save(self, directory: Path) -> None:
        """Write both parts into ``directory``."""
        from safetensors.numpy import save_file

        self.quantizer.save(directory)
        if self.attention is not None:
            unit = self.attention
            tensors = {
                "hidden": unit.hidden,
                "bias": unit.bias,
                "out": unit.out,
                "offset": unit.offset,
            }
            save_file({name: plain(value) for name, value in tensors.items()}, directory / _ATTENTION)

    @classmethod
    def load(cls, directory: Path) -> "UserEncoder":
        """Raises CodecError when a file is missing or unreadable."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            unit = None
            if (directory / _ATTENTION).is_file():
                tensors = load_file(directory / _ATTENTION)
                unit = InterestAttention(**{n: tensors[n] for n in ("hidden", "bias", "out", "offset")})
            return cls(Quantizer.load(directory), unit)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            cause = " ".join(str(error).split())
            raise CodecError(f"{directory} cannot be read: {cause}; restore it from a backup") from error


def pooled(items: ItemVectors, attention: InterestAttention | None, rows: NDArray[np.int64]) -> Vectors:
    """[n, t + d] of users with histories of item rows [n, H], the latest last, -1 behind short ones."""
    there = rows >= 0
    filled = there.any(axis=1, keepdims=True)
    count = np.maximum(there.sum(axis=1, keepdims=True), 1).astype(np.float32)
    mask = there[..., None].astype(np.float32)
    semantic = (items.text[rows] * mask).sum(axis=1) / count
    behaviours = items.behaviour[rows] * mask
    if attention is None:
        interest = behaviours.sum(axis=1) / count
    else:
        last = np.maximum(there.sum(axis=1) - 1, 0)
        target = behaviours[np.arange(len(rows)), last]
        weights = attention.weights(behaviours, target) * there
        interest = (weights[..., None] * behaviours).sum(axis=1)
    joined = np.concatenate([semantic, interest], axis=1)
    return np.asarray(joined * filled, dtype=np.float32)


def padded(histories: Histories) -> NDArray[np.int64]:
    """The last 20 items of each, int64 [n, longest], -1 behind the shorter ones; what is so already stays."""
    if isinstance(histories, np.ndarray):
        return histories
    kept = [np.asarray(history, dtype=np.int64)[-MAX_HISTORY:] for history in histories]
    rows = np.full((len(kept), max([1, *map(len, kept)])), -1, dtype=np.int64)
    for row, history in enumerate(kept):
        rows[row, : len(history)] = history
    return rows


def _half(values: Vectors) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # infinite then, and refused
        return np.ascontiguousarray(values, dtype=np.float16)


def _rounded(values: Vectors) -> Vectors:
    return _half(values).astype(np.float32)
