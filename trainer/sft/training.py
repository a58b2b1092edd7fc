"""The training loop of the base policy: AdamW, warm-up and cosine, batches and dropped items by seed.

Nothing random is carried from step to step: batches and dropped items are functions of (seed, epoch, batch),
so a resumed run needs the weights, the optimizer's state and one number, and goes on exactly (CPU).
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from policies.attention import attention_argument
from policies.head import logits_at
from trainer.checkpoint import Checkpoint
from trainer.ranks import Ranks
from trainer.settings import SftSettings

from .arithmetic import arithmetic, attention_kernels, autocast_type
from .data import IntArray, TokenMap, TreeBatch, Window, batches_of, branches_of, spell, tree_batch
from .lora import keep_all, keep_less, load_trained, seeded, trained_state
from .tasks.mixture import Mixture, task_gradients
from .teacher import Teacher
from .user_scids import UserScids

log = logging.getLogger(__name__)

ALONE = Ranks()


@dataclass(frozen=True)
class Step:
    """Where the training stands, for progress and curves."""

    step: int
    steps: int
    epoch: float
    loss: float
    """Mean over samples and levels, in nats."""
    learning_rate: float
    tokens_per_s: float
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Mean loss of each task with text, in nats a token."""


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Trained:
    """What a finished training gave."""

    steps: int
    losses: list[float]
    """Mean loss of each epoch, in nats a code."""
    samples: int
    """Samples an epoch."""
    tokens: int
    """Tokens read, padding included, since the start or the last resume."""
    seconds: float
    resumed_at: int
    """Step at which this process took over; 0 for an uninterrupted run."""
    task_losses: dict[str, list[float]] = field(default_factory=dict)
    """Of each task with text, the mean loss of each epoch, in nats a token."""


def train_next_item(
    model: Any,
    windows: Sequence[Window],
    tokens: TokenMap,
    settings: SftSettings,
    *,
    learning_rate: float,
    device: str = "cpu",
    checkpoint: Path | None = None,
    run_key: str = "",
    teacher: Teacher | None = None,
    scids: UserScids | None = None,
    mixture: Mixture | None = None,
    ranks: Ranks = ALONE,
    progress: Progress | None = None,
) -> Trained:
    """Train ``model`` in place on every target of ``windows``; it ends on the CPU in evaluation mode.

    ``scids``: of the users of ``windows``, where ``tokens`` has tokens for them. ``mixture``: tasks with text
    that every step learns from besides. ``ranks``: processes that share each step's samples and add up their
    gradients; losses, steps and tokens are those of all of them, and the leading one keeps the checkpoints.

    With ``checkpoint`` (a directory) the state is written there after every epoch, or as settings say, and a
    run that finds the state of an interrupted one with the same ``run_key`` continues it.
    """
    batches = epochs_of(windows, settings)
    steps = sum(len(epoch) for epoch in batches)
    if not getattr(model, "is_quantized", False):
        model.to(device)
    model.train()
    optimizer = adamw(model, learning_rate, settings.weight_decay, device)
    kept = Checkpoint(checkpoint, run_key)
    state = _resume(kept, model, optimizer, device)
    ranks.wait()  # everyone has read the checkpoint before the leading process writes the next
    cast = autocast_type(settings.precision, device)
    if settings.gradient_checkpointing:
        keep_less(model, lambda: attention_kernels(device, cast))
    started, read, resumed_at = time.perf_counter(), 0, state.step

    step = 0
    for epoch, epoch_batches in enumerate(batches):
        for number, batch in enumerate(epoch_batches):
            step += 1
            if step <= state.step:
                continue
            rate = learning_rate * schedule(step - 1, steps, settings.warm_up)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rng = np.random.default_rng([settings.seed, epoch, number, 2])
            chosen = [windows[i] for i in batch]
            told: dict[str, float] = {}
            with seeded(settings.seed, epoch, number, 3):
                loss, used = accumulate(
                    model, chosen, tokens, settings, rng, device, cast, teacher, scids, ranks
                )
                if mixture is not None:
                    texts = mixture.step(epoch, number).part(ranks.count, ranks.index)
                    told, more = task_gradients(model, texts, device, cast, at_once=settings.micro_samples)
                    used += more
            loss, used, told = _added_up(model, ranks, loss, used, told)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            read += used
            state = state.after(step, epoch, loss, sum(len(w.items) - w.first for w in chosen), told)
            if progress is not None:
                speed = read / max(time.perf_counter() - started, 1e-9)
                progress(
                    Step(step, steps, epoch + (number + 1) / len(epoch_batches), loss, rate, speed, told)
                )
            at_end = number + 1 == len(epoch_batches)
            due = step % settings.checkpoint_every == 0 if settings.checkpoint_every else at_end
            if checkpoint is not None and due and ranks.leads:
                kept.save(asdict(state), {"model": trained_state(model), "optimizer": optimizer.state_dict()})
    if settings.gradient_checkpointing:
        keep_all(model)
    if not getattr(model, "is_quantized", False):
        model.to("cpu")
    model.eval()
    samples = sum(len(window.items) - window.first for window in windows)
    return Trained(
        steps,
        state.epoch_means(),
        samples,
        read,
        time.perf_counter() - started,
        resumed_at,
        state.task_means(),
    )


def epochs_of(windows: Sequence[Window], settings: SftSettings) -> list[list[IntArray]]:
    """The batches of every pass: as many passes as settings say, or as ``steps`` take, the last cut off."""
    epochs: list[list[IntArray]] = []
    left = settings.steps
    while len(epochs) < settings.epochs if left is None else left > 0:
        batches = batches_of(
            windows, targets=settings.samples_per_step, seed=settings.seed, epoch=len(epochs)
        )
        epochs.append(batches[:left])
        if left is not None:
            left -= len(epochs[-1])
    return epochs


def accumulate(
    model: Any,
    windows: Sequence[Window],
    tokens: TokenMap,
    settings: SftSettings,
    rng: np.random.Generator,
    device: str,
    cast: torch.dtype | None,
    teacher: Teacher | None = None,
    scids: UserScids | None = None,
    ranks: Ranks = ALONE,
) -> tuple[float, int]:
    """Add the gradient of the mean loss over all targets of ``windows``: (loss, tokens read).

    Split into parts of about ``micro_samples`` targets; their sum is the gradient of the whole. Of several
    ``ranks`` each adds its own rows' part, and their sum over the processes is the whole.
    """
    total = sum(len(window.items) - window.first for window in windows)
    # Dropped items are drawn once for the whole step, so that the split changes nothing.
    branches = branches_of(windows, drop=settings.drop_items, rng=rng)
    if scids is not None:
        branches = scids.told(branches)
    if teacher is not None:
        branches = teacher.blend(branches, rng)
    if tokens.own is not None and settings.spell_items > 0:
        branches = spell(branches, settings.spell_items, rng)
    loss_sum, read = 0.0, 0
    for part in branches.every(ranks.count, ranks.index).split(settings.micro_samples or total):
        batch = tree_batch(part, tokens).to(device)
        with arithmetic(device, cast):
            logits = sample_logits(model, batch)
        loss = sample_losses(logits.float(), batch).sum() / (total * tokens.levels)
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += float(loss.detach())
        read += batch.tokens
    return loss_sum, read


def _added_up(
    model: Any, ranks: Ranks, loss: float, read: int, told: Mapping[str, float]
) -> tuple[float, int, dict[str, float]]:
    """Gradients and figures of a step, summed over the processes."""
    if ranks.count == 1:
        return loss, read, dict(told)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    ranks.add_up_gradients(trained)
    figures = torch.tensor([loss, float(read), *told.values()], dtype=torch.float64, device=trained[0].device)
    ranks.add_up(figures)
    total, tokens, *tasks = figures.tolist()
    return total, round(tokens), dict(zip(told, tasks, strict=True))


def sample_logits(model: Any, batch: TreeBatch) -> Tensor:
    """Logits [N, L, V] of every sample's codes, each given the codes before it."""
    mask = attention_argument(model, batch.allowed, batch.position_ids, batch.position_ids)
    return logits_at(
        model,
        batch.scored,
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
    )


def sample_losses(logits: Tensor, batch: TreeBatch) -> Tensor:
    """Cross-entropy of every sample's codes, [N, L], over the full vocabulary: of the answer, or of the soft
    target given the answer's codes so far. ``logits`` float [N, L, V]."""
    if batch.candidates is None or batch.shares is None:
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
        return loss.view(batch.targets.shape)
    kept = logits.gather(2, batch.candidates)
    # Candidates that are not there have share 0 and read some other token's logit.
    return logits.logsumexp(dim=2) - (batch.shares * kept).sum(dim=2)


def schedule(step: int, steps: int, warm_up: float) -> float:
    """Learning rate as a share of its peak: a linear rise, then a half cosine to 0 at ``steps``."""
    rise = max(int(warm_up * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def adamw(model: Any, rate: float, decay: float, device: str) -> torch.optim.AdamW:
    """AdamW, fused; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=rate, betas=(0.9, 0.98), fused=device.split(":")[0] in ("cpu", "cuda")
    )


@dataclass(frozen=True)
class _State:
    """What besides weights and optimizer a checkpoint holds."""

    step: int = 0
    sums: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    tasks: Mapping[str, list[list[float]]] = field(default_factory=dict)
    """Of each task, [sum of the steps' mean losses, steps] an epoch."""

    def after(self, step: int, epoch: int, loss: float, samples: int, told: Mapping[str, float]) -> "_State":
        sums, counts = list(self.sums), list(self.counts)
        while len(sums) <= epoch:
            sums.append(0.0)
            counts.append(0)
        sums[epoch] += loss * samples
        counts[epoch] += samples
        tasks = {name: [list(epoch) for epoch in epochs] for name, epochs in self.tasks.items()}
        for name, of_task in told.items():
            epochs = tasks.setdefault(name, [])
            epochs += [[0.0, 0] for _ in range(epoch + 1 - len(epochs))]
            epochs[epoch][0] += of_task
            epochs[epoch][1] += 1
        return _State(step, tuple(sums), tuple(counts), tasks)

    def epoch_means(self) -> list[float]:
        return [total / count for total, count in zip(self.sums, self.counts, strict=True) if count]

    def task_means(self) -> dict[str, list[float]]:
        return {name: [total / count for total, count in epochs] for name, epochs in self.tasks.items()}


def _resume(kept: Checkpoint, model: Any, optimizer: torch.optim.Optimizer, device: str) -> _State:
    saved = kept.load(device)
    if saved is None:
        return _State()
    load_trained(model, saved.states["model"])
    optimizer.load_state_dict(saved.states["optimizer"])
    log.info("checkpoint=%s resumed_at_step=%d", kept.directory, saved.facts["step"])
    facts = saved.facts
    return _State(facts["step"], tuple(facts["sums"]), tuple(facts["counts"]), facts.get("tasks", {}))
