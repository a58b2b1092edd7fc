"""Softmax-DPO against an independent float64 formula, and against TRL where the two are the same thing."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.preference.loss import Responses, nll_anchor, preference_metrics, softmax_dpo_loss


def formula(c: float, r: np.ndarray, ref_c: float, ref_r: np.ndarray, beta: float) -> float:
    """The paper's formula as printed, in plain float64 numpy: no logsumexp, no logsigmoid."""
    total = np.sum(np.exp(beta * (r - ref_r) - beta * (c - ref_c)))
    return -math.log(1.0 / (1.0 + math.exp(math.log(total))))


def gradients(
    c: float, r: np.ndarray, ref_c: float, ref_r: np.ndarray, beta: float
) -> tuple[float, np.ndarray]:
    """By hand: with S the sum above, dL/dr_l = beta * e_l / (1 + S) and dL/dc = -beta * S / (1 + S)."""
    e = np.exp(beta * (r - ref_r) - beta * (c - ref_c))
    return -beta * e.sum() / (1 + e.sum()), beta * e / (1 + e.sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    beta=st.sampled_from([0.05, 0.1, 0.5, 1.0, 2.0]),
)
def test_loss_and_gradients_equal_the_printed_formula(seed: int, counts: list[int], beta: float) -> None:
    rng = np.random.default_rng(seed)
    size, width = len(counts), max(counts) + 2
    chosen, ref_chosen = rng.normal(-12, 3, size), rng.normal(-12, 3, size)
    rejected, ref_rejected = rng.normal(-13, 3, (size, width)), rng.normal(-13, 3, (size, width))
    mask = np.zeros((size, width), dtype=bool)
    for row, count in enumerate(counts):
        mask[row, rng.permutation(width)[:count]] = True
    rejected[~mask] = np.nan  # what stands in a masked column must not matter

    c = torch.tensor(chosen, requires_grad=True)
    r = torch.tensor(rejected, requires_grad=True)
    losses = softmax_dpo_loss(
        c, r, torch.tensor(ref_chosen), torch.tensor(ref_rejected), torch.tensor(mask), beta
    )
    losses.sum().backward()
    assert c.grad is not None
    assert r.grad is not None
    for row in range(size):
        keep = mask[row]
        values = (chosen[row], rejected[row][keep], ref_chosen[row], ref_rejected[row][keep], beta)
        assert losses[row].item() == pytest.approx(formula(*values), rel=1e-6, abs=1e-6)
        by_chosen, by_rejected = gradients(*values)
        assert c.grad[row].item() == pytest.approx(by_chosen, abs=1e-6)
        np.testing.assert_allclose(r.grad[row].numpy()[keep], by_rejected, atol=1e-6)
        assert (r.grad[row].numpy()[~keep] == 0).all()


def test_twenty_copies_of_one_rejected_add_the_margin_that_masking_avoids() -> None:
    one = softmax_dpo_loss(*_tensors(1), torch.tensor([[True]]), 1.0)
    masked = softmax_dpo_loss(*_tensors(20), torch.tensor([[True] + [False] * 19]), 1.0)
    repeated = softmax_dpo_loss(*_tensors(20), torch.ones(1, 20, dtype=torch.bool), 1.0)
    assert torch.equal(one, masked)
    # Equal policy and reference: log(1 + 1) against log(1 + 20).
    assert one.item() == pytest.approx(math.log(2), abs=1e-6)
    assert repeated.item() == pytest.approx(math.log(21), abs=1e-6)


def test_extreme_log_ratios_stay_finite() -> None:
    c = torch.tensor([-900.0, -1.0], requires_grad=True)
    r = torch.tensor([[-1.0, -2.0], [-900.0, -800.0]], requires_grad=True)
    zero, zeros = torch.zeros(2), torch.zeros(2, 2)
    losses = softmax_dpo_loss(c, r, zero, zeros, torch.ones(2, 2, dtype=torch.bool), 1.0)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert c.grad is not None
    assert torch.isfinite(c.grad).all()


def test_a_row_without_rejected_is_refused() -> None:
    mask = torch.tensor([[False]])
    with pytest.raises(ValueError, match="without a rejected response"):
        softmax_dpo_loss(*_tensors(1), mask, 1.0)


def test_anchor_is_the_mean_negative_log_likelihood_of_a_token() -> None:
    assert nll_anchor(torch.tensor([-6.0, -3.0]), 3).tolist() == [2.0, 1.0]


def test_one_rejected_equals_trl_loss_gradients_and_metrics() -> None:
    beta, size, length = 0.3, 7, 3
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2 * size, length, generator=generator, dtype=torch.float64) - 2
    reference = torch.randn(2 * size, generator=generator, dtype=torch.float64) - 6

    theirs = tokens.clone().requires_grad_()
    loss_of_trl, metrics_of_trl = _trl_loss(theirs, reference, beta)
    loss_of_trl.backward()

    ours = tokens.clone().requires_grad_()
    sequences = ours.sum(dim=1)
    chosen, rejected = sequences[:size], sequences[size:].unsqueeze(1)
    ref_chosen, ref_rejected = reference[:size], reference[size:].unsqueeze(1)
    mask = torch.ones(size, 1, dtype=torch.bool)
    loss = softmax_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, mask, beta).mean()
    loss.backward()

    assert ours.grad is not None
    assert theirs.grad is not None
    assert loss.item() == pytest.approx(loss_of_trl.item(), abs=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
    metrics = preference_metrics(
        Responses(chosen, rejected, mask), Responses(ref_chosen, ref_rejected, mask), beta
    )
    for name, value in metrics.items():
        # TRL's accuracies pass through float32.
        assert value == pytest.approx(metrics_of_trl[name], abs=1e-7), name


def test_metrics_average_a_samples_own_rejected_only() -> None:
    chosen, zero = torch.tensor([0.0, -1.0]), torch.zeros(2)
    rejected = torch.tensor([[1.0, -1.0, float("nan")], [-2.0, float("nan"), float("nan")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    metrics = preference_metrics(
        Responses(chosen, rejected, mask), Responses(zero, torch.zeros(2, 3), mask), beta=2.0
    )
    assert metrics["rewards/chosen"] == -1.0
    assert metrics["rewards/rejected"] == -2.0
    assert metrics["rewards/margins"] == 1.0
    assert metrics["rewards/accuracies"] == 0.75
    assert metrics["logps/rejected"] == -1.0


def _tensors(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(1), torch.zeros(1, width), torch.zeros(1), torch.zeros(1, width)


def _trl_loss(
    tokens: torch.Tensor, reference: torch.Tensor, beta: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's own ``DPOTrainer._compute_loss`` on given token log-probabilities [2B, L], chosen rows first.

    The trainer is built without its constructor, which wants a model and a dataset; the loss needs neither.
    """
    from accelerate import Accelerator
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer: Any = DPOTrainer.__new__(DPOTrainer)
    rows, length = tokens.shape
    trainer.accelerator = Accelerator(cpu=True)
    trainer.model = torch.nn.Identity().train()
    trainer.aux_loss_enabled = False
    trainer.ld_alpha = None
    trainer.precompute_ref_logps = True
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    trainer.beta, trainer.label_smoothing, trainer.use_weighting = beta, 0.0, False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    outputs = SimpleNamespace(
        log_probs=tokens,
        entropy=torch.zeros(rows, length),
        mean_logits=torch.zeros(rows, length),
        is_top1=torch.zeros(rows, length, dtype=torch.bool),
    )
    ids = torch.zeros(rows, length + 1, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.cat([torch.zeros(rows, 1), torch.ones(rows, length)], dim=1).long(),
        "ref_chosen_logps": reference[: rows // 2],
        "ref_rejected_logps": reference[rows // 2 :],
    }
    loss = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}
