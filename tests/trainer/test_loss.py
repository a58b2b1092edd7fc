"""The losses against independent float64 formulas, and against TRL where the two are the same thing."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.preference.loss import METRIC_NAMES, Responses, preference_loss, preference_metrics
from trainer.settings import StageSettings

CODES = 3
"""Tokens of an answer."""


def stage(**changes: Any) -> StageSettings:
    return StageSettings(name="stage", data="easy", **changes)


def responses(chosen: Any, rejected: Any, mask: Any = None, fork: Any = None) -> Responses:
    """From tensors or nested lists; everything counts unless ``mask`` says otherwise."""
    c, r = (one if torch.is_tensor(one) else torch.tensor(one) for one in (chosen, rejected))
    m = torch.ones_like(r, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return Responses(c, r, m, torch.zeros_like(r) if fork is None else torch.as_tensor(fork))


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
    losses = preference_loss(
        responses(c, r, mask), responses(ref_chosen, ref_rejected, mask), stage(beta=beta), CODES
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
    nothing = responses([0.0], [[0.0] * 20], [[True] + [False] * 19])
    one = preference_loss(responses([0.0], [[0.0]]), responses([0.0], [[0.0]]), stage(), CODES)
    masked = preference_loss(nothing, nothing, stage(), CODES)
    whole = responses([0.0], [[0.0] * 20])
    repeated = preference_loss(whole, whole, stage(), CODES)
    assert torch.equal(one, masked)
    # Equal policy and reference: log(1 + 1) against log(1 + 20).
    assert one.item() == pytest.approx(math.log(2), abs=1e-6)
    assert repeated.item() == pytest.approx(math.log(21), abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing": 0.1}, {"loss": "dpo"}, {"loss": "ipo"}])
def test_extreme_log_ratios_stay_finite(changes: dict[str, Any]) -> None:
    c = torch.tensor([-900.0, -1.0], requires_grad=True)
    r = torch.tensor([[-1.0, -2.0], [-900.0, -800.0]], requires_grad=True)
    nothing = responses(torch.zeros(2), torch.zeros(2, 2))
    losses = preference_loss(responses(c, r), nothing, stage(**changes), CODES)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert c.grad is not None
    assert torch.isfinite(c.grad).all()


def test_a_row_without_rejected_is_refused() -> None:
    nothing = responses([0.0], [[0.0]], [[False]])
    with pytest.raises(ValueError, match="without a rejected response"):
        preference_loss(nothing, nothing, stage(), CODES)


def test_the_anchor_adds_the_mean_negative_log_likelihood_of_a_token() -> None:
    policy, reference = responses([-6.0, -3.0], [[-7.0], [-5.0]]), responses([-5.0, -4.0], [[-7.0], [-6.0]])
    plain = preference_loss(policy, reference, stage(), 3)
    anchored = preference_loss(policy, reference, stage(anchor=0.5), 3)
    assert (anchored - plain).tolist() == pytest.approx([0.5 * 2.0, 0.5 * 1.0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["softmax", "dpo", "ipo"]),
    smoothing=st.sampled_from(["conservative", "robust"]),
    share=st.sampled_from([0.0, 0.1, 0.4]),
    beta=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_every_loss_equals_its_formula_written_out(
    seed: int, kind: str, smoothing: str, share: float, beta: float
) -> None:
    rng = np.random.default_rng(seed)
    share = 0.0 if kind == "ipo" else share
    policy, reference = (
        (rng.normal(-12, 3, 1), rng.normal(-12, 3, (1, 5)), np.array([[1, 0, 1, 1, 0]], dtype=bool))
        for _ in range(2)
    )
    found = preference_loss(
        responses(*map(torch.tensor, policy)), responses(*map(torch.tensor, reference)),
        stage(loss=kind, smoothing=smoothing, label_smoothing=share, beta=beta), 4,
    )  # fmt: skip
    margins = [(policy[0] - reference[0] - policy[1][0, n] + reference[1][0, n])[0] for n in (0, 2, 3)]

    def log_loss(u: float) -> float:
        clean, flipped = math.log(1 + math.exp(-u)), math.log(1 + math.exp(u))
        if smoothing == "robust":
            return ((1 - share) * clean - share * flipped) / (1 - 2 * share)
        return (1 - share) * clean + share * flipped

    wanted = {
        "softmax": lambda: log_loss(-math.log(sum(math.exp(-beta * m) for m in margins))),
        "dpo": lambda: sum(log_loss(beta * m) for m in margins) / 3,
        "ipo": lambda: sum((m / 4 - 1 / (2 * beta)) ** 2 for m in margins) / 3,
    }[kind]()
    assert found.item() == pytest.approx(wanted, rel=1e-9)


def test_robust_smoothing_is_unbiased_under_the_noise_it_names() -> None:
    """Flip a share eps of the labels: the mean robust loss is the clean loss without noise."""
    right = responses([-3.0], [[-5.0]])
    wrong = responses([-5.0], [[-3.0]])
    reference, eps = responses([-4.0], [[-4.5]]), 0.2
    swapped = responses([-4.5], [[-4.0]])
    robust = stage(label_smoothing=eps, smoothing="robust")
    noisy = (1 - eps) * preference_loss(right, reference, robust, 1) + eps * preference_loss(
        wrong, swapped, robust, 1
    )
    clean = preference_loss(right, reference, stage(), 1)
    torch.testing.assert_close(noisy, clean)


def test_smoothing_without_a_loss_that_has_it_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing is not defined for the loss ipo"):
        stage(loss="ipo", label_smoothing=0.1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "sigmoid"),
        ({"loss": "dpo"}, "sigmoid"),
        ({"loss": "dpo", "label_smoothing": 0.2, "smoothing": "robust"}, "robust"),
        ({"label_smoothing": 0.2, "smoothing": "robust"}, "robust"),
        ({"loss": "ipo"}, "ipo"),
        ({"anchor": 0.7}, "sigmoid+sft"),
    ],
)
def test_one_rejected_equals_trl_loss_gradients_and_metrics(changes: dict[str, Any], name: str) -> None:
    beta, size, length = 0.3, 7, 3
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(2 * size, length, generator=generator, dtype=torch.float64) - 2
    reference = torch.randn(2 * size, generator=generator, dtype=torch.float64) - 6

    theirs = tokens.clone().requires_grad_()
    wanted = stage(beta=beta, **changes)
    loss_of_trl, metrics_of_trl = _trl_loss(theirs, reference, wanted, name.split("+"))
    loss_of_trl.backward()

    ours = tokens.clone().requires_grad_()
    sequences = ours.sum(dim=1)
    chosen, rejected = sequences[:size], sequences[size:].unsqueeze(1)
    ref_chosen, ref_rejected = reference[:size], reference[size:].unsqueeze(1)
    mask = torch.ones(size, 1, dtype=torch.bool)
    policy, before = responses(chosen, rejected, mask), responses(ref_chosen, ref_rejected, mask)
    loss = preference_loss(policy, before, wanted, length).mean()
    loss.backward()

    assert ours.grad is not None
    assert theirs.grad is not None
    assert loss.item() == pytest.approx(loss_of_trl.item(), abs=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
    metrics = preference_metrics(policy, before, beta)
    shared = [metric for metric in METRIC_NAMES if metric in metrics_of_trl]
    assert len(shared) == 6
    for metric in shared:
        # TRL's accuracies pass through float32.
        assert metrics[metric] == pytest.approx(metrics_of_trl[metric], abs=1e-7), metric


def test_metrics_average_a_samples_own_rejected_only() -> None:
    chosen, zero = torch.tensor([0.0, -1.0]), torch.zeros(2)
    rejected = torch.tensor([[1.0, -1.0, float("nan")], [-2.0, float("nan"), float("nan")]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    metrics = preference_metrics(
        responses(chosen, rejected, mask), responses(zero, torch.zeros(2, 3), mask), beta=2.0
    )
    assert metrics["rewards/chosen"] == -1.0
    assert metrics["rewards/rejected"] == -2.0
    assert metrics["rewards/margins"] == 1.0
    assert metrics["rewards/accuracies"] == 0.75
    assert metrics["logps/rejected"] == -1.0


def test_the_margin_at_the_fork_is_of_the_first_code_that_differs() -> None:
    policy = responses([0.0], [[0.0, 0.0]], fork=[[3.0, 1.0]])
    reference = responses([0.0], [[0.0, 0.0]], fork=[[1.0, 2.0]])
    assert preference_metrics(policy, reference, beta=2.0)["rewards/margins_divergent"] == 1.0


def test_kl_is_that_of_the_scored_answers_renormalised() -> None:
    p, q = np.array([0.2, 0.1, 0.05]), np.array([0.1, 0.1, 0.1])
    policy, reference = (
        responses(np.log(one[:1]).tolist(), [[*np.log(one[1:]), float("nan")]], [[True, True, False]])
        for one in (p, q)
    )
    p, q = p / p.sum(), q / q.sum()
    found = preference_metrics(policy, reference, beta=1.0)["kl"]
    assert found == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert preference_metrics(policy, policy, beta=1.0)["kl"] == pytest.approx(0, abs=1e-7)


def _trl_loss(
    tokens: torch.Tensor, reference: torch.Tensor, wanted: StageSettings, names: list[str]
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
    trainer.loss_types, trainer.loss_weights = names, [1.0, wanted.anchor][: len(names)]
    trainer.beta, trainer.label_smoothing = wanted.beta, wanted.label_smoothing
    trainer.use_weighting = False
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
