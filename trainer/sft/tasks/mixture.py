"""Which samples of which tasks a step learns from, and how their losses add up.

    loss of a step = next-item loss + sum over tasks t of w_t * mean over the target tokens of t's samples

Task t gives max(1, round(share * w_t * samples_per_step)) samples a step: those of step n of an epoch are the
numbers n * count to (n + 1) * count - 1 of the task's stream (``Task.draw``), so every step is a function of
(seed, epoch, n) alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from policies.codec import ScidCodec
from policies.prompt import PromptTokens
from trainer.errors import CannotTrain
from trainer.settings import SftSettings
from trainer.sft.arithmetic import arithmetic
from trainer.sft.data import IntArray
from trainer.sft.packing import TOKENS_AT_ONCE, TextSample, packed, packed_logits
from trainer.sft.user_scids import UserScids

from .alignment import ItemToText, ProfileToUser, TextToItem, UserToProfile
from .histories import IntentionToItem, ItemsToTitle, MixedHistory, Preference, TitlesToItem
from .task import Material, Task
from .words import CatalogueText, ItemWords
from .writing import Writer

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        TitlesToItem,
        ItemsToTitle,
        MixedHistory,
        IntentionToItem,
        TextToItem,
        ItemToText,
        Preference,
        ProfileToUser,
        UserToProfile,
    )
}


@dataclass(frozen=True)
class TaskStep:
    """The text samples of one step."""

    samples: list[TextSample]
    task: IntArray
    """[samples] index of the task that each belongs to."""
    names: tuple[str, ...]
    weights: npt.NDArray[np.float64]
    """[tasks]"""
    width: int
    """Tokens of the longest row they are packed into."""
    pad: int
    target_tokens: IntArray
    """[tasks] tokens of the targets of each task, of all processes' samples."""

    def part(self, count: int, begin: int) -> "TaskStep":
        """Every ``count``-th sample from ``begin`` on: one process's; their gradients add up to the whole."""
        return replace(self, samples=self.samples[begin::count], task=self.task[begin::count])


class Mixture:
    """The tasks of weight above 0, ready to give each step its samples."""

    def __init__(self, tasks: Mapping[str, Task], settings: SftSettings) -> None:
        """Raises CannotTrain when there is no sample at all of one of ``tasks``, or no end token for its
        answers."""
        self.tasks = dict(tasks)
        self._seed = settings.seed
        weights = settings.tasks.weights
        self._weights = np.array([weights[name] for name in tasks], dtype=np.float64)
        share = settings.tasks.share * settings.samples_per_step
        self._counts = [max(1, round(share * weights[name])) for name in tasks]
        for name, task in self.tasks.items():
            require_samples(name, task)

    @classmethod
    def of(
        cls,
        settings: SftSettings,
        codec: ScidCodec,
        tokenizer: Any,
        model: Any,
        histories: Sequence[IntArray],
        users: UserScids | None,
        catalogue: CatalogueText,
    ) -> "Mixture | None":
        """The tasks that ``settings`` give a weight; none where all are 0. Raises CannotTrain as above."""
        names = [name for name, weight in settings.tasks.weights.items() if weight > 0]
        if not names:
            return None
        tasks = open_tasks(names, settings, codec, tokenizer, model, histories, users, catalogue)
        return cls(tasks, settings)

    def report(self, losses: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
        """Plain values by task: weight, samples a step, samples there are before wordings, samples skipped
        for want of text, and ``losses``, the mean of each epoch."""
        return {
            name: {
                "weight": float(weight),
                "samples_per_step": count,
                "samples": task.samples,
                "skipped": task.skipped,
                "losses": losses.get(name, []),
            }
            for (name, task), weight, count in zip(
                self.tasks.items(), self._weights, self._counts, strict=True
            )
        }

    def step(self, epoch: int, number: int) -> TaskStep:
        """The samples of the ``number``-th step of an epoch, a function of these and the seed."""
        samples, owner = [], []
        for index, (task, count) in enumerate(zip(self.tasks.values(), self._counts, strict=True)):
            samples += [
                task.draw(self._seed, epoch, place) for place in range(number * count, (number + 1) * count)
            ]
            owner += [index] * count
        writer = next(iter(self.tasks.values())).writer
        sizes = [len(sample.target) for sample in samples]
        return TaskStep(
            samples,
            np.array(owner, dtype=np.int64),
            tuple(self.tasks),
            self._weights,
            writer.limit,
            writer.tokens.pad,
            np.bincount(owner, weights=sizes, minlength=len(self.tasks)).astype(np.int64),
        )


def open_tasks(
    names: Sequence[str],
    settings: SftSettings,
    codec: ScidCodec,
    tokenizer: Any,
    model: Any,
    histories: Sequence[IntArray],
    users: UserScids | None,
    catalogue: CatalogueText,
) -> dict[str, Task]:
    """The tasks called ``names``; ``histories``: rows of the codec, ``users``: their SCIDs.

    Raises CannotTrain for a tokenizer that splits SCID tokens.
    """
    context = context_of(model)
    writer = Writer(tokenizer, PromptTokens(tokenizer, codec), settings, context)
    material = Material(histories, ItemWords(codec.item_ids, catalogue), writer, users)
    return {name: TASKS[name](material) for name in names}


def require_samples(name: str, task: Task) -> None:
    """Raises CannotTrain when ``task`` has no sample, or nothing to end its answers with."""
    if not task.samples:
        raise CannotTrain(f"task {name} has no sample: {task.lacks}, or set trainer.sft.tasks.{name} to 0")
    if not task.writer.can_end and any(form.answer not in ("item", "user") for form in task.templates):
        raise CannotTrain(
            f"task {name} answers in words, and the backbone's tokenizer has no end token; give it one "
            f"(eos_token), or set trainer.sft.tasks.{name} to 0"
        )


def context_of(model: Any) -> int | None:
    """Tokens that the model can read; none where its configuration names no limit."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def require_context(model: Any, tokens: PromptTokens) -> None:
    """Raises CannotTrain for a model that cannot read the longest prompt with its answer."""
    context, needed = context_of(model), tokens.longest + tokens.codec.levels - 1
    if context is not None and context < needed:
        raise CannotTrain(
            f"the backbone reads {context} tokens, a full history with its answer takes {needed}; take a "
            "backbone with a longer context"
        )


def task_gradients(
    model: Any, step: TaskStep, device: str, cast: torch.dtype | None, *, at_once: int | None = None
) -> tuple[dict[str, float], int]:
    """Add the gradient of the tasks' part of a step's loss: (mean loss of each task, tokens read).

    ``at_once``: samples that go through the model at once at most; none: as many as packing puts there. The
    split changes nothing.
    """
    sizes = step.target_tokens
    of_token = torch.from_numpy((step.weights / np.maximum(sizes, 1))[step.task]).float().to(device)
    sums, read = np.zeros(len(step.names)), 0
    together = TOKENS_AT_ONCE.get(device.split(":")[0], TOKENS_AT_ONCE["cpu"])
    for rows in packed(step.samples, width=step.width, pad=step.pad, most=at_once, at_once=together):
        batch = rows.to(device)
        with arithmetic(device, cast):
            logits = packed_logits(model, batch)
        losses = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        (losses * of_token[batch.sample]).sum().backward()  # type: ignore[no-untyped-call]
        owners = step.task[rows.sample.numpy()]
        sums += np.bincount(owners, weights=losses.detach().cpu().numpy(), minlength=len(step.names))
        read += batch.tokens
    return dict(zip(step.names, (sums / np.maximum(sizes, 1)).tolist(), strict=True)), read
