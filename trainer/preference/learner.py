"""The policy while a stage trains it: scoring all answers of a sample at once, and one optimizer step.

Scores are log pi of ``policies.scoring``, one packed sequence a sample. A step's loss is the weighted mean
over its batch, however the batch is cut into micro batches or shared between processes.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from policies.policy import Policy
from policies.scoring import PackedBatch, pack, token_log_probs
from policies.weights import quiet
from trainer.errors import TrainerError
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings
from trainer.sft.lora import keep_all, keep_less, load_trained, trained_state

from .loss import Responses, preference_loss, preference_metrics
from .samples import Samples

log = logging.getLogger(__name__)

# Model size from which the published learning rate is right; below it, see StageSettings.learning_rate.
_LARGE = 100_000_000
_LARGE_RATE, _SMALL_RATE = 1e-5, 2e-4

_T = TypeVar("_T")


class Learner:
    """A policy with trainable LoRA matrices and their optimizer.

    Invariant: before the first step the model's scores are those of the policy it was made from.
    """

    def __init__(
        self, policy: Policy, stage: StageSettings, settings: PreferenceSettings, ranks: Ranks
    ) -> None:
        self.policy, self.stage, self.settings, self.ranks = policy, stage, settings, ranks
        self._new = not hasattr(policy.model, "peft_config")
        self.model = _with_lora(policy, settings)
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        size = sum(weight.numel() for weight in self.model.parameters())
        self.rate: float = stage.learning_rate or (_LARGE_RATE if size >= _LARGE else _SMALL_RATE)
        self.micro_batch = settings.micro_batch
        """Samples that go through the model at once: the settings', halved where memory ran out."""
        self._optimizer = torch.optim.AdamW(
            self.weights, lr=self.rate, weight_decay=settings.weight_decay, fused=True
        )
        if settings.gradient_checkpointing:
            keep_less(self.model)

    def step(
        self, samples: Samples, reference: Responses, batch: list[int], done: int, total: int
    ) -> dict[str, float]:
        """One optimizer step on the samples numbered in ``batch``, the ``done``-th (from 0) of ``total``.

        ``reference`` holds all samples' responses. Returns the metrics of the policy before the step, under
        TRL's names. Raises TrainerError when loss or gradient is not finite, or memory does not even take one
        sample.
        """
        rate = self.rate * schedule(done, total, self.settings.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        refs = reference.rows(batch)
        losses, seen = self._fitting(lambda: self._backward(samples, refs, batch))
        self.ranks.add_up(losses, seen.chosen, seen.rejected, seen.fork)
        self.ranks.add_up_gradients(self.weights)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.settings.gradient_norm).item()
        loss = losses.sum().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainerError(
                f"stage {self.stage.name}: loss {loss} and gradient norm {norm} at step {done + 1}: lower "
                "the stage's learning_rate or beta"
            )
        self._optimizer.step()
        self._new = False
        metrics = preference_metrics(seen, refs, self.stage.beta)
        return {"step": done + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm, **metrics}

    def responses(self, samples: Samples) -> Responses:
        """The policy's log-probabilities of every answer of all samples, without dropout or gradient.

        New LoRA matrices change nothing until the first step and are left out until then: the same bits, a
        sixth sooner.
        """
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter() if self._new else nullcontext():
            found = self._fitting(lambda: self._scored(samples))
        self.model.train()
        self.ranks.add_up(found.chosen, found.rejected, found.fork)
        return found

    def loss_on(self, samples: Samples, reference: Responses) -> float:
        """Weighted mean loss of samples that are not trained on."""
        now = self.responses(samples)
        losses = preference_loss(now, reference, self.stage, samples.answers.length)
        return float((losses * _shares(samples, list(range(len(samples))), losses)).sum())

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the LoRA matrices, by name."""
        return {name: weight.clone() for name, weight in trained_state(self.model).items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put a snapshot back."""
        load_trained(self.model, weights)
        self._new = False

    def state(self) -> dict[str, Any]:
        """All that a step depends on besides samples and settings: for a checkpoint."""
        return {"model": trained_state(self.model), "optimizer": self._optimizer.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.restore(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])

    def finished(self) -> Any:
        """The model as it is written: without what only training needs."""
        if self.settings.gradient_checkpointing:
            keep_all(self.model)
        return self.model

    def _backward(self, samples: Samples, refs: Responses, batch: list[int]) -> tuple[Tensor, Responses]:
        """The batch's gradients; losses [B] as they add up and scores, zero where not this process's."""
        self._optimizer.zero_grad(set_to_none=True)
        losses = torch.zeros_like(refs.chosen)
        seen = _nothing(refs.mask, refs.chosen)
        shares = _shares(samples, batch, losses)
        mine = self.ranks.share(list(range(len(batch))))
        for start in range(0, len(mine), self.micro_batch):
            rows = mine[start : start + self.micro_batch]
            now = self._score(samples, [batch[row] for row in rows])
            each = shares[rows] * preference_loss(now, refs.rows(rows), self.stage, samples.answers.length)
            each.sum().backward()  # type: ignore[no-untyped-call]
            losses[rows] = each.detach()
            _put(now, seen, rows)
        return losses, seen

    def _scored(self, samples: Samples) -> Responses:
        """This process's share of ``responses``; zero where not its own."""
        found = _nothing(mask_of(samples).to(self.policy.device))
        for chunk in samples.by_length(self.settings.micro_batch):
            mine = self.ranks.share(chunk)
            for start in range(0, len(mine), self.micro_batch):
                rows = mine[start : start + self.micro_batch]
                _put(self._score(samples, rows), found, rows)
        return found

    def _score(self, samples: Samples, numbers: list[int]) -> Responses:
        """log pi of the answers of these samples, float32, as wide as the most answers among them."""
        packed = pack(
            [samples.prompts[number] for number in numbers],
            [samples.answers[number] for number in numbers],
            self.policy.tokens.pad,
        ).to(self.policy.device)
        tokens = token_log_probs(self.model, packed).masked_fill(~packed.token_mask, 0.0)
        scores = tokens.sum(dim=2)
        return Responses(scores[:, 0], scores[:, 1:], packed.answer_mask[:, 1:], _forks(tokens, packed))

    def _fitting(self, work: Callable[[], _T]) -> _T:
        """``work()``, done anew with half the micro batch whenever memory runs out; same result."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                cause = error.with_traceback(None)  # the failed pass's tensors hang on its frames
            if self.micro_batch == 1:
                raise TrainerError(
                    f"stage {self.stage.name}: {self.policy.device} is out of memory with one sample at a "
                    "time: set trainer.preference.gradient_checkpointing, or lower max_rejected"
                ) from cause
            self.micro_batch = (min(self.micro_batch, self.settings.batch_size) + 1) // 2
            log.warning(
                "stage=%s out_of_memory=true device=%s micro_batch=%d result=unchanged",
                self.stage.name,
                self.policy.device,
                self.micro_batch,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def mask_of(samples: Samples) -> Tensor:
    """Which rejected responses are there, bool [N, R]."""
    counts = torch.from_numpy(samples.answers.counts - 1)
    width = int(counts.max()) if len(samples) else 0
    return torch.arange(width) < counts[:, None]


def schedule(done: int, total: int, warmup: float) -> float:
    """Factor on the peak rate: linear up over the first ``warmup`` of the steps, then a cosine to 0."""
    rising = math.ceil(total * warmup)
    if done < rising:
        return (done + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (done - rising) / max(1, total - rising)))


def _shares(samples: Samples, numbers: list[int], like: Tensor) -> Tensor:
    """Each sample's share of the loss of these: its weight over the sum of theirs."""
    weights = samples.weights[numbers]
    return torch.from_numpy(weights / weights.sum()).to(like)


def _forks(tokens: Tensor, packed: PackedBatch) -> Tensor:
    """``Responses.fork`` from log pi of every token [B, 1 + R, L]."""
    first = (packed.targets[:, 1:] != packed.targets[:, :1]).int().argmax(dim=2, keepdim=True)
    chosen = tokens[:, :1].expand(-1, first.shape[1], -1)
    return (chosen.gather(2, first) - tokens[:, 1:].gather(2, first)).squeeze(2)


def _nothing(mask: Tensor, like: Tensor | None = None) -> Responses:
    """Zeros, to be filled."""
    chosen = torch.zeros(len(mask), device=mask.device) if like is None else torch.zeros_like(like)
    zeros = chosen[:, None].expand(mask.shape).clone()
    return Responses(chosen, zeros, mask, zeros.clone())


def _put(some: Responses, into: Responses, rows: list[int]) -> None:
    """Fill these rows, without gradient."""
    width = some.rejected.shape[1]
    into.chosen[rows] = some.chosen.detach()
    into.rejected[rows, :width] = some.rejected.detach()
    into.fork[rows, :width] = some.fork.detach()


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device, or torch on the CPU, could not get memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
