"""Examples of what SFT would learn from, as a person reads them. Nothing is trained."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from policies.codec import ScidCodec
from policies.prompt import PromptTokens, prompt_ids
from trainer.errors import CannotTrain
from trainer.settings import SftSettings
from trainer.sft.base_policy import index_histories, most_frequent
from trainer.sft.data import IntArray
from trainer.sft.presets import open_backbone
from trainer.sft.user_scids import UserScids

from .mixture import open_tasks, require_samples
from .words import NO_TEXT, CatalogueText

NEXT_ITEM = "next_item"
"""What is always learned, under a name of its own."""


@dataclass(frozen=True)
class Example:
    """One sample."""

    prompt: str
    """What the model reads; it is not trained to say it."""
    target: str
    """The trained part."""


@dataclass(frozen=True)
class TaskPreview:
    """One task's examples, or why there are none."""

    task: str
    does: str
    weight: float
    samples: int
    """Samples that can be made."""
    skipped: int
    """Samples left out for want of text."""
    examples: list[Example]
    missing: str | None = None
    """Why no sample can be made."""


def preview_tasks(
    codec_dir: Path,
    histories: Sequence[Sequence[str]],
    settings: SftSettings,
    *,
    examples: int,
    all_tasks: bool = False,
    texts: Iterable[str] = (),
    catalogue: CatalogueText = NO_TEXT,
) -> list[TaskPreview]:
    """The first ``examples`` samples of next-item prediction and of each task that has a weight.

    ``all_tasks``: of those of weight 0 too; a task without a sample then says why in place of failing.
    The samples are those that a training with the same input and seed begins with.

    Raises CannotTrain when a task that has a weight has no sample, or the backbone cannot be used, and
    PolicyRefused for a codec that cannot be read.
    """
    codec = ScidCodec.load(codec_dir)
    indexed = index_histories(codec, histories)
    backbone = open_backbone(
        settings.backbone,
        codec,
        texts,
        text_vocabulary=settings.text_vocabulary,
        seed=settings.seed,
        items=most_frequent(indexed, len(codec), settings.item_tokens),
    )
    weights = settings.tasks.weights
    names = [name for name, weight in weights.items() if all_tasks or weight > 0]
    users = UserScids.of(codec, indexed)
    tasks = open_tasks(names, settings, codec, backbone.tokenizer, backbone.model, indexed, users, catalogue)
    found = [_next_items(PromptTokens(backbone.tokenizer, codec), backbone.tokenizer, indexed, examples)]
    for name, task in tasks.items():
        missing = None
        try:
            require_samples(name, task)
        except CannotTrain as error:
            if weights[name] > 0:
                raise
            missing = str(error)
        drawn = [task.draw(settings.seed, 0, number) for number in range(0 if missing else examples)]
        said = task.writer.readable
        shown = [Example(said(sample.prompt), said(sample.target)) for sample in drawn]
        found.append(TaskPreview(name, task.does, weights[name], task.samples, task.skipped, shown, missing))
    return found


def _next_items(
    tokens: PromptTokens, tokenizer: Any, histories: Sequence[IntArray], examples: int
) -> TaskPreview:
    """The last target of the first histories."""
    names = tokens.codec.item_ids
    samples = sum(max(len(history) - 1, 0) for history in histories)
    shown = []
    for history in islice((history for history in histories if len(history) > 1), examples):
        prompt = prompt_ids(tokens, [names[row] for row in history[:-1]])
        target = tokens.answer(names[history[-1]])
        shown.append(Example(tokenizer.decode(prompt), tokenizer.decode(target)))
    return TaskPreview(NEXT_ITEM, "history as SCIDs -> SCID of the next item", 1.0, samples, 0, shown)
