"""Text samples side by side in one row, none seeing another: a step's samples without their padding.

A sample is a prompt and a target; the model is fed both but the target's last token, and predicts the target
from the prompt's last token on. A row holds several samples in an order of its own,

    padding | all but the last prompt token of sample 1, 2, .. | the tokens that predict, of sample 1, 2, ..

Position ids start at 0 for every sample and the attention mask is block-diagonal, so where a token lies in
the row is seen by nobody: loss and gradients are those of separate sequences (tested). The head is computed
for what predicts alone; it lies at the end of every row because stock models with another head than a plain
matrix take one choice of columns for all rows of a batch (``policies.head``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policies.attention import attention_argument
from policies.head import logits_at
from trainer.errors import TrainerError

SHORTEST_ROW = 128
"""Capacity of the rows that short samples open; those of longer ones double it until they fit. Attention is
worked out over whole rows: of samples of 60 tokens ``tiny`` read 2,600 a second in rows of 128, 1,840 in rows
of 256, 1,460 in rows of 512, and 1,715 where each is padded to the longest (bfloat16, one core)."""

TOKENS_AT_ONCE = {"cpu": 4_096, "cuda": 32_768}
"""Tokens that go through the model at once at most, by device; bounds memory, changes no result. A CPU is
faster with less: ``tiny`` read 2,265 tokens/s by 2,048 and 1,841 by 16,384 (rows of 256, one core)."""


@dataclass(frozen=True)
class TextSample:
    """One prompt and what is to be answered. Invariant: both hold at least one token."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.target:
            raise TrainerError("a sample needs a prompt and a target of at least one token each")

    @property
    def tokens(self) -> int:
        """Tokens the model is fed."""
        return len(self.prompt) + len(self.target) - 1


@dataclass(frozen=True)
class PackedRows:
    """Model input for several samples. B rows of T tokens; N target tokens in all."""

    input_ids: Tensor
    """int64 [B, T]."""
    position_ids: Tensor
    """int64 [B, T], from 0 for every sample."""
    allowed: Tensor
    """bool [B, T, T], True where the query (row) may see the key (column)."""
    scored: Tensor
    """int64 [N]: places in the flattened [B T] that predict."""
    targets: Tensor
    """int64 [N]: token ids of what they predict."""
    sample: Tensor
    """int64 [N]: number of the sample that each belongs to."""

    def to(self, device: str | torch.device) -> "PackedRows":
        """The same rows on ``device``."""
        return PackedRows(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.allowed.to(device),
            self.scored.to(device),
            self.targets.to(device),
            self.sample.to(device),
        )

    @property
    def tokens(self) -> int:
        """Tokens the model reads, padding included."""
        return self.input_ids.numel()


def packed(
    samples: Sequence[TextSample],
    *,
    width: int,
    pad: int,
    most: int | None = None,
    at_once: int = TOKENS_AT_ONCE["cpu"],
) -> list[PackedRows]:
    """``samples`` in rows of at most ``width`` tokens, rows of like length together.

    At most ``most`` samples (none: all) and about ``at_once`` tokens go into one batch; every batch is one
    pass through the model. A function of its arguments alone. Raises TrainerError for a longer sample.
    """
    order = sorted(range(len(samples)), key=lambda number: -samples[number].tokens)
    if order and samples[order[0]].tokens > width:
        raise TrainerError(
            f"a sample of {samples[order[0]].tokens} tokens does not fit a row of {width}; "
            "raise trainer.sft.tasks.row_tokens"
        )
    batches = []
    for start in range(0, len(order), most or max(len(order), 1)):
        rows = first_fit(samples, order[start : start + (most or len(order))], width)
        for alike in _alike(samples, rows, at_once):
            batches.append(_packed(samples, alike, pad))
    return batches


def first_fit(samples: Sequence[TextSample], order: Sequence[int], width: int) -> list[list[int]]:
    """Sample numbers of each row: every sample of ``order``, longest first, into the first row with room.

    A row that a sample opens has a capacity of SHORTEST_ROW tokens, doubled until the sample fits, ``width``
    at most; shorter samples fill what is left.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order:
        need = samples[number].tokens
        for row, left in enumerate(room):
            if need <= left:
                rows[row].append(number)
                room[row] -= need
                break
        else:
            capacity = min(SHORTEST_ROW, width)
            while capacity < need:
                capacity = min(2 * capacity, width)
            rows.append([number])
            room.append(capacity - need)
    return rows


def packed_logits(model: Any, rows: PackedRows) -> Tensor:
    """Logits [N, V] of every target token, each given its own sample's tokens before it."""
    mask = attention_argument(model, rows.allowed, rows.position_ids, rows.position_ids)
    return logits_at(
        model,
        rows.scored,
        input_ids=rows.input_ids,
        attention_mask=mask,
        position_ids=rows.position_ids,
    )


def _alike(
    samples: Sequence[TextSample], rows: Sequence[Sequence[int]], at_once: int
) -> list[list[Sequence[int]]]:
    """Rows of like length, about ``at_once`` tokens a batch."""
    filled = [sum(samples[number].tokens for number in row) for row in rows]
    batches: list[list[Sequence[int]]] = []
    widest = 0
    for row in sorted(range(len(rows)), key=lambda row: -filled[row]):
        fits = batches and (len(batches[-1]) + 1) * widest <= at_once
        if not fits or 4 * filled[row] <= 3 * widest:
            batches.append([])
            widest = filled[row]
        batches[-1].append(rows[row])
    return batches


def _packed(samples: Sequence[TextSample], rows: Sequence[Sequence[int]], pad: int) -> PackedRows:
    fed = [sum(samples[number].tokens for number in row) for row in rows]
    tails = [sum(len(samples[number].target) for number in row) for row in rows]
    width = max(fed)
    ids = np.full((len(rows), width), pad, dtype=np.int64)
    position = np.zeros((len(rows), width), dtype=np.int64)
    owner = np.full((len(rows), width), -1, dtype=np.int64)  # padding is one company: it sees itself
    scored, targets, sample = [], [], []
    for row, numbers in enumerate(rows):
        contexts = np.cumsum([width - fed[row], *(len(samples[n].prompt) - 1 for n in numbers)])
        ends = np.cumsum([width - tails[row], *(len(samples[n].target) for n in numbers)])
        for number, before, behind in zip(numbers, pairwise(contexts), pairwise(ends), strict=True):
            one = samples[number]
            read = np.array([*one.prompt, *one.target[:-1]], dtype=np.int64)
            split = len(one.prompt) - 1
            for place, part in ((before, slice(0, split)), (behind, slice(split, len(read)))):
                ids[row, slice(*place)] = read[part]
                position[row, slice(*place)] = np.arange(len(read))[part]
                owner[row, slice(*place)] = number
            scored.append(np.arange(*behind) + row * width)
            targets.append(np.array(one.target, dtype=np.int64))
            sample.append(np.full(len(one.target), number, dtype=np.int64))
    where, when = torch.from_numpy(owner), torch.from_numpy(position)
    same = where[:, :, None] == where[:, None, :]
    return PackedRows(
        torch.from_numpy(ids),
        when,
        same & (when[:, None, :] <= when[:, :, None]),
        torch.from_numpy(np.concatenate(scored)),
        torch.from_numpy(np.concatenate(targets)),
        torch.from_numpy(np.concatenate(sample)),
    )
