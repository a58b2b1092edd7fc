"""The policy while a stage trains it: scoring all answers of a sample at once, and one optimizer step.

Scores are log pi of ``policies.scoring``, one packed sequence a sample. A step's loss is the mean over its
batch, however the batch is cut into micro batches or shared between processes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from policies.policy import Policy
from policies.scoring import answer_log_probs, pack
from policies.weights import quiet
from trainer.errors import TrainerError
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings

from .loss import Responses, nll_anchor, preference_metrics, softmax_dpo_loss
from .samples import Samples

# Model size from which the published learning rate is right; below it, see StageSettings.learning_rate.
_LARGE = 100_000_000
_LARGE_RATE, _SMALL_RATE = 1e-5, 1e-3


class Learner:
    """A policy with trainable LoRA matrices and their optimizer.

    Invariant: before the first step the model's scores are those of the policy it was made from.
    """

    def __init__(
        self, policy: Policy, stage: StageSettings, settings: PreferenceSettings, ranks: Ranks
    ) -> None:
        self.policy, self.stage, self.settings, self.ranks = policy, stage, settings, ranks
        self.model = _with_lora(policy, settings)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        size = sum(weight.numel() for weight in self.model.parameters())
        self.rate: float = stage.learning_rate or (_LARGE_RATE if size >= _LARGE else _SMALL_RATE)
        self._optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=settings.weight_decay, fused=True
        )

    def step(
        self, samples: Samples, reference: Responses, batch: list[int], done: int, total: int
    ) -> dict[str, float]:
        """One optimizer step on the samples numbered in ``batch``, the ``done``-th (from 0) of ``total``.

        ``reference`` holds all samples' responses. Returns the metrics of the policy before the step, under
        TRL's names. Raises TrainerError when loss or gradient is not finite.
        """
        rate = self.rate * schedule(done, total, self.settings.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad(set_to_none=True)
        refs = _rows(reference, batch)
        losses, seen = self._backward(samples, refs, batch)
        self.ranks.add_up(losses, seen.chosen, seen.rejected)
        self.ranks.add_up_gradients(self.weights)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.gradient_norm).item()
        loss = losses.mean().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainerError(
                f"stage {self.stage.name}: loss {loss} and gradient norm {norm} at step {done + 1}: lower "
                "the stage's learning_rate or beta"
            )
        self._optimizer.step()
        metrics = preference_metrics(seen, refs, self.stage.beta)
        return {"step": done + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, **metrics}

    def responses(self, samples: Samples) -> Responses:
        """The policy's log-probabilities of every answer of all samples, without dropout or gradient."""
        width = max(len(several) for several in samples.answers)
        scores = torch.zeros(len(samples), width, device=self.policy.device)
        self.model.eval()
        with torch.no_grad():
            for chunk in samples.by_length(self.settings.micro_batch):
                mine = self.ranks.share(chunk)
                if mine:
                    found = self._score(samples, mine)
                    scores[mine, : found.shape[1]] = found
        self.model.train()
        self.ranks.add_up(scores)
        return as_responses(scores, samples)

    def loss_on(self, samples: Samples, reference: Responses) -> float:
        """Mean loss of samples that are not trained on."""
        now = self.responses(samples)
        losses = softmax_dpo_loss(
            now.chosen, now.rejected, reference.chosen, reference.rejected, now.mask, self.stage.beta
        )
        return float(losses.mean())

    def snapshot(self) -> list[Tensor]:
        """A copy of the LoRA matrices."""
        return [weight.detach().clone() for weight in self.weights]

    def restore(self, weights: list[Tensor]) -> None:
        """Put a snapshot back."""
        with torch.no_grad():
            for weight, saved in zip(self.weights, weights, strict=True):
                weight.copy_(saved)

    def _backward(self, samples: Samples, refs: Responses, batch: list[int]) -> tuple[Tensor, Responses]:
        """Add the batch's gradients; returns this process's losses [B] and scores, zero where not its own."""
        width = refs.mask.shape[1]
        losses = torch.zeros_like(refs.chosen)
        seen = Responses(torch.zeros_like(refs.chosen), torch.zeros_like(refs.rejected), refs.mask)
        mine = self.ranks.share(list(range(len(batch))))
        for start in range(0, len(mine), self.settings.micro_batch):
            rows = mine[start : start + self.settings.micro_batch]
            scores = self._score(samples, [batch[row] for row in rows])
            chosen = scores[:, 0]
            rejected = torch.nn.functional.pad(scores[:, 1:], (0, width + 1 - scores.shape[1]))
            each = softmax_dpo_loss(
                chosen, rejected, refs.chosen[rows], refs.rejected[rows], refs.mask[rows], self.stage.beta
            )
            if self.stage.anchor:
                each = each + self.stage.anchor * nll_anchor(chosen, self.policy.codec.levels)
            (each.sum() / len(batch)).backward()  # type: ignore[no-untyped-call]
            losses[rows], seen.chosen[rows] = each.detach(), chosen.detach()
            seen.rejected[rows] = rejected.detach()
        return losses, seen

    def _score(self, samples: Samples, numbers: list[int]) -> Tensor:
        """log pi of the answers of these samples, float32 [len(numbers), 1 + R], chosen first."""
        batch = pack(
            [samples.prompts[number] for number in numbers],
            [samples.answers[number] for number in numbers],
            self.policy.tokens.pad,
        )
        return answer_log_probs(self.model, batch.to(self.policy.device))


def as_responses(scores: Tensor, samples: Samples) -> Responses:
    """Split scores [N, 1 + R] into chosen and rejected, with the mask of those that are there."""
    counts = torch.tensor([len(several) - 1 for several in samples.answers], device=scores.device)
    mask = torch.arange(scores.shape[1] - 1, device=scores.device) < counts[:, None]
    return Responses(scores[:, 0], scores[:, 1:], mask)


def schedule(done: int, total: int, warmup: float) -> float:
    """Factor on the peak rate: linear up over the first ``warmup`` of the steps, then a cosine to 0."""
    rising = math.ceil(total * warmup)
    if done < rising:
        return (done + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (done - rising) / max(1, total - rising)))


def _rows(responses: Responses, numbers: list[int]) -> Responses:
    """These rows, with no more columns than the longest of them needs."""
    mask = responses.mask[numbers]
    width = int(mask.sum(dim=1).max())
    return Responses(responses.chosen[numbers], responses.rejected[numbers, :width], mask[:, :width])


def _with_lora(policy: Policy, settings: PreferenceSettings) -> Any:
    """The model with trainable LoRA matrices: the adapter it has, or new ones (which start as no change)."""
    if hasattr(policy.model, "peft_config"):
        return policy.model
    from peft import LoraConfig, get_peft_model

    targets = settings.lora_targets
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    with quiet():
        return get_peft_model(policy.model, config).train()
