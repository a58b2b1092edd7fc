"""Text samples in shared rows: what a sample gives there is what it gives alone."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from policies.codec import ScidCodec
from tests.trainer.small_sft import model_for
from trainer.errors import TrainerError
from trainer.sft.packing import TextSample, first_fit, packed, packed_logits

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(20, 4), (3, 3), (1, 1), (9, 12), (40, 3), (5, 30), (60, 3), (2, 9), (17, 1)]


def samples_of(sizes: list[tuple[int, int]], seed: int = 0) -> list[TextSample]:
    draw = np.random.default_rng(seed)
    return [
        TextSample(
            tuple(draw.integers(5, 200, prompt).tolist()), tuple(draw.integers(5, 200, target).tolist())
        )
        for prompt, target in sizes
    ]


def packed_losses(model: Any, samples: list[TextSample], **how: Any) -> list[torch.Tensor]:
    """Mean cross-entropy of each sample's target, in packed rows."""
    sums = [torch.zeros(()) for _ in samples]
    for rows in packed(samples, pad=0, **how):
        losses = F.cross_entropy(packed_logits(model, rows), rows.targets, reduction="none")
        for number in rows.sample.unique().tolist():
            sums[number] = sums[number] + losses[rows.sample == number].mean()
    return sums


def separate_losses(model: Any, samples: list[TextSample]) -> list[torch.Tensor]:
    """The same, each sample a plain sequence without a mask."""
    found = []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt, *sample.target]])
        logits = model(ids).logits[0, len(sample.prompt) - 1 : -1]
        found.append(F.cross_entropy(logits, ids[0, len(sample.prompt) :]))
    return found


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_packed_rows_give_the_loss_and_gradients_of_separate_sequences(style: str, codec: ScidCodec) -> None:
    model, samples = model_for(codec, style), samples_of(SIZES)
    together = torch.stack(packed_losses(model, samples, width=64))
    together.mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    alone = torch.stack(separate_losses(model, samples))
    alone.mean().backward()
    # float32: the sums run in another order.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-5, rtol=1e-5)


def test_another_sample_of_the_row_changes_nothing(codec: ScidCodec) -> None:
    model, samples = model_for(codec), samples_of([(20, 4), (15, 6), (8, 3)])
    other = [samples[0], samples_of([(15, 6)], seed=9)[0], samples[2]]
    with torch.no_grad():
        before, after = (packed_losses(model, some, width=128) for some in (samples, other))
    assert before[0] == after[0]
    assert before[2] == after[2]
    assert before[1] != after[1]


@pytest.mark.parametrize("most", [1, 2, 100])
def test_how_samples_are_split_into_passes_changes_nothing(most: int, codec: ScidCodec) -> None:
    model, samples = model_for(codec), samples_of(SIZES)
    with torch.no_grad():
        whole = torch.stack(packed_losses(model, samples, width=64))
        split = torch.stack(packed_losses(model, samples, width=64, most=most))
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=1e-5)


def test_what_predicts_lies_at_the_end_of_every_row(codec: ScidCodec) -> None:
    model, samples = model_for(codec), samples_of([(60, 3)] * 12)
    (rows,) = packed(samples, width=128, pad=0)
    assert rows.input_ids.shape == (6, 124)
    assert (rows.scored % 124).unique().tolist() == list(range(118, 124))
    # A head that is no plain matrix is computed for these columns alone.
    plain = packed_logits(model, rows)
    read: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, given, _out: read.append(given[0].shape[1]))
    model.config.final_logit_softcapping = 1.0
    torch.testing.assert_close(packed_logits(model, rows), plain, atol=1e-5, rtol=1e-5)
    assert read == [6]


def test_a_row_is_laid_out_as_documented() -> None:
    one, two = TextSample((11, 12, 13), (14, 15)), TextSample((21, 22), (23,))
    (rows,) = packed([two, one], width=64, pad=0)
    # All but the last prompt token of both, the longer first; then what predicts.
    assert rows.input_ids.tolist() == [[11, 12, 21, 13, 14, 22]]
    assert rows.position_ids.tolist() == [[0, 1, 0, 2, 3, 1]]
    assert rows.scored.tolist() == [3, 4, 5]
    assert rows.targets.tolist() == [14, 15, 23]
    assert rows.sample.tolist() == [1, 1, 0]
    assert rows.allowed[0, 4].tolist() == [True, True, False, True, True, False]
    assert rows.allowed[0, 5].tolist() == [False, False, True, False, False, True]


@hypothesis_settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 50)), min_size=1, max_size=40))
def test_every_target_token_is_scored_once_within_the_width(sizes: list[tuple[int, int]]) -> None:
    samples = samples_of(sizes)
    order = sorted(range(len(samples)), key=lambda number: -samples[number].tokens)
    rows = first_fit(samples, order, 256)
    assert sorted(number for row in rows for number in row) == list(range(len(samples)))
    assert all(sum(samples[number].tokens for number in row) <= 256 for row in rows)

    batches = packed(samples, width=256, pad=0)
    found = {number: [] for number in range(len(samples))}  # type: ignore[var-annotated]
    for batch in batches:
        assert batch.input_ids.shape[1] <= 256
        assert bool(batch.allowed.diagonal(dim1=1, dim2=2).all())  # nothing attends to nothing
        for number, token in zip(batch.sample.tolist(), batch.targets.tolist(), strict=True):
            found[number].append(token)
    assert [tuple(found[number]) for number in found] == [sample.target for sample in samples]


def test_rows_are_well_filled() -> None:
    draw = np.random.default_rng(0)
    samples = samples_of([(int(n), 4) for n in draw.geometric(1 / 60, 600).clip(8, 400)])
    read = sum(batch.tokens for batch in packed(samples, width=512, pad=0))
    # What is left is padding; padded to the longest of all, it would be five sixths.
    assert sum(sample.tokens for sample in samples) / read > 0.95


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(TrainerError, match="row_tokens"):
        packed(samples_of([(100, 4)]), width=64, pad=0)
    with pytest.raises(TrainerError, match="at least one token"):
        TextSample((1,), ())
    assert packed([], width=64, pad=0) == []
