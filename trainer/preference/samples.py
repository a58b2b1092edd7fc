"""Preference samples as token ids: what a stage's table of item ids means to one policy.

SCIDs exist only inside a policy, so the same table gives other tokens with another codec. Items that the
codec does not know are left out and counted; a sample's chosen response stands first, then its rejected ones.
Tokens lie in flat arrays: as Python lists a stage of 100,000 samples would take half a gigabyte.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from policies.prompt import TEMPLATE_VERSION, PromptTokens, prompts_ids
from trainer.errors import BrokenSamples

# Batches are cut from windows of this many shuffled batches, sorted by length: little padding, still random.
_WINDOW = 16
# Histories that are Python objects at once.
_ROWS = 4096

IntArray = NDArray[np.integer[Any]]


class Ragged(Sequence[list[int]]):
    """Lists of numbers of any length, in one flat int32 array."""

    def __init__(self, values: IntArray, starts: IntArray) -> None:
        """``values`` [sum of lengths]; ``starts`` [N + 1], the last one the end."""
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> "Ragged":
        """The same lists, flat."""
        lengths = [len(one) for one in lists]
        values = np.fromiter((number for one in lists for number in one), np.int32, count=sum(lengths))
        return cls(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))

    @classmethod
    def joined(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """One after the other."""
        if not parts:
            return cls.of([])
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        starts = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
        return cls(np.concatenate([part.values for part in parts]), np.concatenate([*starts, ends[-1:]]))

    @property
    def lengths(self) -> IntArray:
        """Of each list, [N]."""
        found: IntArray = np.diff(self.starts)
        return found

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, number: int) -> list[int]: ...
    @overload
    def __getitem__(self, number: slice) -> list[list[int]]: ...
    def __getitem__(self, number: int | slice) -> list[int] | list[list[int]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        one = range(len(self))[number]
        found: list[int] = self.values[self.starts[one] : self.starts[one + 1]].tolist()
        return found


class Answers(Sequence[list[list[int]]]):
    """The answers of each sample, all of ``length`` tokens, in one flat array."""

    def __init__(self, tokens: Ragged, length: int) -> None:
        """``tokens``: of each sample, its answers' tokens one after the other."""
        self.tokens, self.length = tokens, length

    @property
    def counts(self) -> IntArray:
        """Answers of each sample, [N]."""
        found: IntArray = self.tokens.lengths // self.length
        return found

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, number: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, number: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, number: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        flat = self.tokens[number]
        return [flat[start : start + self.length] for start in range(0, len(flat), self.length)]


@dataclass(frozen=True, eq=False)
class Samples:
    """N preference samples in the table's order. ``answers[n][0]`` is chosen, the others are rejected."""

    ids: list[str]
    prompts: Ragged
    answers: Answers
    weights: NDArray[np.float64]
    """[N], of a sample's loss among those of its batch; 1 where the table has no weights."""
    refused: dict[str, int]
    """Samples of the table that cannot be learned from, by reason."""

    @classmethod
    def of(
        cls,
        ids: Sequence[str],
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        weights: Sequence[float] | None = None,
    ) -> "Samples":
        """From token ids; every answer has as many tokens as the first."""
        length = len(answers[0][0]) if answers else 1
        if any(len(answer) != length for several in answers for answer in several):
            raise BrokenSamples(f"answers of one stage must have the same number of tokens, here {length}")
        flat = Ragged.of([[token for answer in several for token in answer] for several in answers])
        given = np.ones(len(ids)) if weights is None else np.array(weights, dtype=np.float64)
        return cls(list(ids), Ragged.of(prompts), Answers(flat, length), given, {})

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a log-probability of these samples depends on, besides the model."""
        digest = hashlib.sha256(json.dumps([TEMPLATE_VERSION, self.answers.length]).encode())
        for name in self.ids:
            digest.update(f"{name}\0".encode())
        for lists in (self.prompts, self.answers.tokens):
            digest.update(lists.starts.astype("<i8").tobytes())
            digest.update(lists.values.astype("<i4").tobytes())
        return digest.hexdigest()

    def by_length(self, size: int) -> Iterator[list[int]]:
        """All sample numbers in chunks of ``size``, shortest first."""
        order = self._sorted(np.arange(len(self)))
        for start in range(0, len(order), size):
            yield order[start : start + size].tolist()

    def epoch(self, size: int, random: np.random.Generator) -> list[list[int]]:
        """One pass in random batches of ``size``, samples of like length together; one may be smaller."""
        order = random.permutation(len(self))
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _WINDOW):
            window = self._sorted(order[start : start + size * _WINDOW]).tolist()
            batches += [window[begin : begin + size] for begin in range(0, len(window), size)]
        return [batches[number] for number in random.permutation(len(batches)).tolist()]

    def _sorted(self, numbers: IntArray) -> IntArray:
        """These samples by the length of the prompt, then the number of answers; equal ones stay in order."""
        return numbers[np.lexsort((self.answers.counts[numbers], self.prompts.lengths[numbers]))]


def encode_samples(table: pa.Table, tokens: PromptTokens, max_rejected: int) -> Samples:
    """Turn a stage's table (columns sample_id, history, chosen, rejected, and weight if any) into token ids.

    Raises BrokenSamples for a sample whose chosen item is among its rejected ones, or whose weight is no
    positive number: such a table is broken.
    """
    ids = table.column("sample_id").to_pylist()
    weights = _weights(table, ids)
    chosen, rejected, sample = _item_rows(table, ids, tokens)
    rejected, sample = _first_known(rejected, sample, max_rejected)
    left = np.bincount(sample, minlength=len(ids))
    kept = np.flatnonzero((chosen >= 0) & (left > 0))
    unknown = int((chosen < 0).sum())
    refused = {
        "chosen item has no SCID in this codec": unknown,
        "no rejected item has a SCID in this codec": len(ids) - len(kept) - unknown,
    }
    # Of each sample, its chosen item and then its rejected ones.
    starts = np.concatenate([[0], np.cumsum(left[kept] + 1)])
    rows = np.empty(starts[-1], dtype=np.int64)
    first = np.zeros(len(rows), dtype=np.bool_)
    first[starts[:-1]] = True
    rows[first], rows[~first] = chosen[kept], rejected[(chosen >= 0)[sample]]
    levels = tokens.codec.levels
    spelled = tokens.answers(rows).reshape(-1).astype(np.int32)
    return Samples(
        ids=[ids[number] for number in kept.tolist()],
        prompts=_prompts(table.column("history").take(pa.array(kept)), tokens),
        answers=Answers(Ragged(spelled, starts * levels), levels),
        weights=weights[kept],
        refused={reason: count for reason, count in refused.items() if count},
    )


def _item_rows(
    table: pa.Table, ids: list[str], tokens: PromptTokens
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the codec, -1 where it has none: chosen [N]; rejected [M], and the sample of each."""
    chosen, rejected = (table.column(name).combine_chunks() for name in ("chosen", "rejected"))
    sample, items = pc.list_parent_indices(rejected), pc.list_flatten(rejected)
    same = pc.equal(items, chosen.take(sample)).to_numpy(zero_copy_only=False)
    if same.any():
        place = int(np.flatnonzero(same)[0])
        number = sample[place].as_py()
        raise BrokenSamples(
            f"sample {ids[number]} rejects the item {items[place]} that it chose: build the dataset again"
        )
    known = pa.array(tokens.codec.item_ids, pa.string())

    def rows(names: pa.Array) -> NDArray[np.int64]:
        found = pc.index_in(names.cast(pa.string()), value_set=known).fill_null(-1)
        numbers: NDArray[np.int64] = found.to_numpy(zero_copy_only=False).astype(np.int64)
        return numbers

    return rows(chosen), rows(items), sample.to_numpy(zero_copy_only=False).astype(np.int64)


def _first_known(
    rejected: NDArray[np.int64], sample: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Those that the codec knows, of each sample the first ``most``; and the sample of each."""
    known = rejected >= 0
    rejected, sample = rejected[known], sample[known]
    place = np.arange(len(sample)) - np.searchsorted(sample, sample)
    return rejected[place < most], sample[place < most]


def _weights(table: pa.Table, ids: list[str]) -> NDArray[np.float64]:
    """The column ``weight``, or ones."""
    if "weight" not in table.column_names:
        return np.ones(len(ids))
    weights: NDArray[np.float64] = table.column("weight").to_numpy().astype(np.float64)
    broken = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(broken):
        given = table.column("weight")[int(broken[0])].as_py()
        raise BrokenSamples(
            f"sample {ids[int(broken[0])]} has weight {given}, which is no positive number: "
            "build the dataset again"
        )
    return weights


def _prompts(histories: pa.ChunkedArray, tokens: PromptTokens) -> Ragged:
    """The prompt of each history of item ids."""
    starts = range(0, len(histories), _ROWS)
    return Ragged.joined(
        [Ragged.of(prompts_ids(tokens, histories.slice(start, _ROWS).to_pylist())) for start in starts]
    )
