"""Preference samples as token ids: what a stage's table of item ids means to one policy.

SCIDs exist only inside a policy, so the same table gives other tokens with another codec. Items that the
codec does not know are left out and counted; a sample's chosen response stands first, then its rejected ones.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from policies.prompt import TEMPLATE_VERSION, PromptTokens, prompts_ids
from trainer.errors import TrainerError

# Batches are cut from windows of this many shuffled batches, sorted by length: little padding, still random.
_WINDOW = 16


@dataclass(frozen=True)
class Samples:
    """N preference samples in the table's order. ``answers[n][0]`` is chosen, the others are rejected."""

    ids: list[str]
    prompts: list[list[int]]
    answers: list[list[list[int]]]
    refused: dict[str, int]
    """Samples of the table that cannot be learned from, by reason."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that a log-probability of these samples depends on, besides the model."""
        content = json.dumps([TEMPLATE_VERSION, self.ids, self.prompts, self.answers]).encode()
        return hashlib.sha256(content).hexdigest()

    def by_length(self, size: int) -> Iterator[list[int]]:
        """All sample numbers in chunks of ``size``, shortest first."""
        order = sorted(range(len(self)), key=self._length)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def epoch(self, size: int, random: np.random.Generator) -> list[list[int]]:
        """One pass in random batches of ``size``, samples of like length together; one may be smaller."""
        order = random.permutation(len(self)).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _WINDOW):
            window = sorted(order[start : start + size * _WINDOW], key=self._length)
            batches += [window[begin : begin + size] for begin in range(0, len(window), size)]
        return [batches[number] for number in random.permutation(len(batches)).tolist()]

    def _length(self, number: int) -> tuple[int, int]:
        return len(self.prompts[number]), len(self.answers[number])


def encode_samples(table: pa.Table, tokens: PromptTokens, max_rejected: int) -> Samples:
    """Turn a stage's table (columns sample_id, history, chosen, rejected) into token ids.

    Raises TrainerError for a sample whose chosen item is among its rejected ones: such a table is broken.
    """
    known = tokens.codec.items
    refused: Counter[str] = Counter()
    ids: list[str] = []
    histories: list[Sequence[str]] = []
    answers: list[list[list[int]]] = []
    for sample_id, history, chosen, rejected in _rows(table):
        if chosen in rejected:
            raise TrainerError(
                f"sample {sample_id} rejects the item {chosen} that it chose: build the dataset again"
            )
        if chosen not in known:
            refused["chosen item has no SCID in this codec"] += 1
            continue
        negatives = [item for item in rejected if item in known][:max_rejected]
        if not negatives:
            refused["no rejected item has a SCID in this codec"] += 1
            continue
        ids.append(sample_id)
        histories.append(history)
        answers.append([tokens.answer(item) for item in (chosen, *negatives)])
    return Samples(ids, prompts_ids(tokens, histories), answers, dict(refused))


def _rows(table: pa.Table) -> Iterator[tuple[str, Sequence[str], str, Sequence[str]]]:
    columns = ("sample_id", "history", "chosen", "rejected")
    return zip(*(table.column(name).to_pylist() for name in columns), strict=True)
