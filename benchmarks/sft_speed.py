"""Speed of SFT on next items: our step against a padded transformers Trainer loop and TRL's SFTTrainer.

    python benchmarks/sft_speed.py beauty/ [--backbone demo] [--users 4000] [--seconds 5] [--json]

The same model from the same weights, the same histories, the same targets a step, AdamW, one process. Ours
reads a history once for all its targets (trainer.sft.data); the others get every target of every history as
a sequence of its own, the prompt masked: ``trainer`` pads a batch to its longest sequence, ``trainer, by
length`` also puts sequences of like length together, ``fewer at once`` puts a quarter of them through the
model at a time, ``trl`` packs them (SFTTrainer, completion-only loss). Everybody runs in bfloat16 autocast
and in float32, and is judged by its faster one. A loop runs for ``--seconds`` of CPU time, which other work
on the machine does not stretch; its first step is not counted.

Targets/s is what counts. Tokens/s are those of the separate sequences without padding, prompt and answer,
whoever reads them: targets/s times their mean length, so that the two have the same ratio.
"""

import argparse
import gzip
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from align3gr.console import say
from policies.codec import ScidCodec
from policies.prompt import HISTORY, PromptTokens
from trainer.settings import SftSettings
from trainer.sft.base_policy import token_map
from trainer.sft.data import IntArray, TokenMap, windows_of
from trainer.sft.presets import Backbone, open_backbone
from trainer.sft.training import Step, train_next_item

SIZES = (256, 256, 256)
STEP = 512
"""Targets an optimizer step learns from, in every loop."""
PACKED = 2
"""Packed rows that TRL puts through the model at once."""


@dataclass(frozen=True)
class Speed:
    """What one loop did."""

    targets: int
    seconds: float

    @property
    def targets_per_s(self) -> float:
        """Targets learned from a CPU second, the first step left out."""
        return self.targets / self.seconds


@dataclass(frozen=True)
class Work:
    """What everybody trains on."""

    histories: Sequence[IntArray]
    tokens: TokenMap
    backbone: Callable[[], Backbone]
    seconds: float
    micro: int
    """Sequences that the others put through the model at once."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU seconds of each loop.")
    parser.add_argument("--micro", type=int, default=128, help="Sequences at once in the others' loops.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    logging.disable(logging.WARNING)
    work = work_of(wanted.folder, wanted.backbone, wanted.users, wanted.seconds, wanted.micro)
    lengths = np.concatenate([np.arange(1, len(one)).clip(max=HISTORY) for one in work.histories])
    mean = float((lengths * work.tokens.levels).mean()) + len(work.tokens.begin) + 1 + work.tokens.levels
    loops: dict[str, Callable[[Work, bool], Speed]] = {
        "ours": ours,
        "trainer": lambda work, bf16: by_trainer(work, bf16, by_length=False),
        "trainer, fewer at once": lambda work, bf16: by_trainer(
            replace(work, micro=work.micro // 4), bf16, by_length=False
        ),
        "trainer, by length": lambda work, bf16: by_trainer(work, bf16, by_length=True),
        "trl": by_trl,
    }
    found: dict[str, dict[str, Any]] = {}
    for name, loop in loops.items():
        for bf16 in (False, True):
            speed = loop(work, bf16)
            kind = "bfloat16" if bf16 else "float32"
            found.setdefault(name, {})[kind] = speed.targets_per_s
            say(f"{name:24} {kind:9} {speed.targets_per_s:9,.0f} targets/s")
        best = max(found[name].values())
        found[name] |= {"targets_per_s": best, "tokens_per_s": best * mean}
    ratios = {
        f"ours / {name}": found["ours"]["targets_per_s"] / found[name]["targets_per_s"]
        for name in loops
        if name != "ours"
    }
    for name, ratio in ratios.items():
        say(f"{name:30} {ratio:6.2f}x")
    if wanted.json:
        facts = {"backbone": wanted.backbone, "users": len(work.histories), "targets": len(lengths)}
        facts |= {"tokens_a_target": mean, "targets_a_step": STEP, "loops": found, "ratios": ratios}
        print(json.dumps(facts))


def work_of(folder: Path, backbone: str, users: int, seconds: float, micro: int) -> Work:
    """The training histories of the first users; SCIDs are drawn, which changes no speed."""
    with gzip.open(folder / "sequences.jsonl.gz", "rt") as lines:
        whole = [json.loads(line) for line in lines]
    row = {item: place for place, item in enumerate(sorted({item for one in whole for item in one}))}
    histories = [np.array([row[item] for item in one[:-2]], dtype=np.int64) for one in whole[:users]]
    numbers = np.random.default_rng(0).choice(int(np.prod(SIZES)), size=len(row), replace=False)
    codes = np.stack(np.unravel_index(numbers, SIZES), axis=1)
    codec = ScidCodec([str(item) for item in row], codes, SIZES, quantizer_hash="drawn")

    def opened() -> Backbone:
        return open_backbone(backbone, codec, ["a lamp"], text_vocabulary=None, seed=0)

    tokens = token_map(PromptTokens(opened().tokenizer, codec))
    return Work(histories, tokens, opened, seconds, micro)


def ours(work: Work, bf16: bool) -> Speed:
    """``train_next_item``, the product's loop."""
    settings = SftSettings(
        samples_per_step=STEP, epochs=10, drop_items=0.0, precision="bfloat16" if bf16 else "float32"
    )
    watch = Watch(work.seconds)

    def progress(_: Step) -> None:
        watch.step()

    windows = windows_of(work.histories, max_history=HISTORY)
    backbone = work.backbone()
    with suppress(Enough):
        train_next_item(backbone.model, windows, work.tokens, settings, learning_rate=1e-3, progress=progress)
    return watch.speed()


def by_trainer(work: Work, bf16: bool, *, by_length: bool) -> Speed:
    """transformers' Trainer on padded sequences, the prompt masked."""
    from transformers import Trainer, TrainingArguments

    backbone = work.backbone()
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            per_device_train_batch_size=work.micro,
            gradient_accumulation_steps=STEP // work.micro,
            max_steps=10_000,
            learning_rate=1e-3,
            bf16=bf16,
            use_cpu=True,
            train_sampling_strategy="group_by_length" if by_length else "random",
            **quiet(),
        )
        watch = Watch(work.seconds)
        trainer = Trainer(
            model=backbone.model,
            args=arguments,
            train_dataset=sequences(work),
            data_collator=padded(work.tokens.pad),
            callbacks=[watch.callback()],
        )
        trainer.train()
    return watch.speed()


def by_trl(work: Work, bf16: bool) -> Speed:
    """TRL's SFTTrainer: completion-only loss, sequences packed to 256 tokens.

    A batch of packed rows becomes one row, which is cheap under flash attention alone: a dense mask over it
    grows with the square of its length, so few rows go through the model at once (67: 25 times slower).
    """
    from trl import SFTConfig, SFTTrainer

    length = 256
    backbone = work.backbone()
    given = sequences(work)
    mean = sum(len(one["input_ids"]) for one in given) / len(given)
    rows = max(1, round(STEP * mean / length / PACKED))  # times PACKED: rows that hold about STEP targets
    with tempfile.TemporaryDirectory() as place:
        arguments = SFTConfig(
            output_dir=place,
            per_device_train_batch_size=PACKED,
            gradient_accumulation_steps=rows,
            max_steps=10_000,
            learning_rate=1e-3,
            bf16=bf16,
            use_cpu=True,
            packing=True,
            max_length=length,
            completion_only_loss=True,
            **quiet(),
        )
        watch = Watch(work.seconds)
        trainer = SFTTrainer(
            model=backbone.model,
            args=arguments,
            train_dataset=masked(given),
            processing_class=backbone.tokenizer,
            callbacks=[watch.callback()],
        )
        packed = len(trainer.train_dataset)
        trainer.train()
    return Speed(round(watch.steps * rows * PACKED * len(given) / packed), watch.elapsed)


def sequences(work: Work) -> list[dict[str, list[int]]]:
    """Every target of every history as a sequence: 20 items before it, ``<recommend>``, its codes."""
    tokens, found = work.tokens, []
    for history in work.histories:
        for place in range(1, len(history)):
            before = tokens.items[history[max(0, place - HISTORY) : place]].reshape(-1).tolist()
            prompt, answer = [*tokens.begin, *before, tokens.recommend], tokens.items[history[place]].tolist()
            found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


def padded(pad: int) -> Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """A collator that pads to the longest sequence of the batch."""

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad)
        labels, mask = torch.full((len(rows), width), -100), torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[place, :length] = torch.tensor(row["input_ids"])
            labels[place, :length] = torch.tensor(row["labels"])
            mask[place, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return collate


def masked(rows: list[dict[str, list[int]]]) -> Any:
    """The same sequences as TRL wants them."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "completion_mask": [[int(label >= 0) for label in row["labels"]] for row in rows],
        }
    )


def quiet() -> dict[str, Any]:
    """Nothing is saved, reported or drawn, and the learning rate does not move."""
    return {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "dataloader_num_workers": 0,
        "seed": 0,
    }


class Enough(Exception):  # noqa: N818 - not an error: the time is up
    """Ends our loop."""


class Watch:
    """Counts steps and CPU seconds from the end of the first step on."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.steps, self.elapsed = seconds, -1, 0.0
        self._began = 0.0

    def tick(self) -> bool:
        """One step more; whether the time is up."""
        self.steps += 1
        if self.steps == 0:
            self._began = time.process_time()
            return False
        self.elapsed = time.process_time() - self._began
        return self.elapsed > self.limit

    def step(self) -> None:
        """One step more; raises Enough when the time is up."""
        if self.tick():
            raise Enough

    def callback(self) -> Any:
        """The same for transformers."""
        from transformers import TrainerCallback

        watch = self

        class Stop(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> Any:
                control.should_training_stop = watch.tick()
                return control

        return Stop()

    def speed(self) -> Speed:
        """Of steps of STEP targets."""
        return Speed(self.steps * STEP, self.elapsed)


if __name__ == "__main__":
    main()
