"""What the tests of SFT train with: quick settings, a tiny model, histories as rows of its codec."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from policies.codec import ScidCodec
from tests.policies.factory import tiny_model, tiny_tokenizer
from trainer.settings import SftSettings, TokenizationSettings
from trainer.sft.teacher import Teacher
from trainer.sft.votes import sequential_rules

QUICK = SftSettings(
    backbone="demo",
    epochs=2,
    samples_per_step=64,
    text_vocabulary=260,
    precision="float32",
    item_tokens=0,
    new_tokens="mean",
    teacher_weight=0.0,
)
TOKENIZATION = TokenizationSettings(users=False, hidden=(32,), code_dimension=8, steps=60, text_dimension=12)


def model_for(codec: ScidCodec, style: str = "llama") -> Any:
    """A random model that knows the codec's tokens; the same for the same codec."""
    return tiny_model(len(tiny_tokenizer(codec)), style=style)


def rows_of(codec: ScidCodec, lengths: Sequence[int], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """One history of each length, of different items."""
    random = np.random.default_rng(seed)
    return [random.permutation(len(codec))[:length].astype(np.int64) for length in lengths]


def rules_teacher(
    histories: Sequence[np.ndarray[Any, Any]], n_items: int, *, keep: int, weight: float
) -> Teacher:
    """A teacher that knows sequential rules and nothing else."""
    votes = [(1.0, sequential_rules(histories, n_items))]
    return Teacher.of(histories, n_items, votes, keep=keep, weight=weight)
