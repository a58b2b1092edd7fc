"""One optimizer step of preference training: ours against the published shape of S-DPO and TRL's DPO trainer.

    python benchmarks/preference_step.py [--backbone tiny] [--lengths 60,120,240] [--prompts 8] [--json]

The same model from the same weights, the same new LoRA matrices, the same samples (one chosen, 20 rejected, 4
tokens each), float32, AdamW, one process; the losses of all steps are asserted to be the same. Device: CPU or
``--device cuda``.

- ours: ``Learner``. A prompt is read once for its 21 answers (policies.scoring); the reference's
  log-probabilities come from the policy itself, one more pass over the samples as in a stage of one epoch.
- sdpo: the published S-DPO loop. Every answer is a padded sequence of its own behind its prompt, logits at
  every position, and a second model in memory is asked for the reference. Also without that pass's time.
- trl: ``DPOTrainer`` on the 20 pairs that a sample makes, judged by our ``dpo`` loss on the same samples.
  Without gradient checkpointing, reference by adapters off: its fastest way here.

sdpo and trl put ``--at-once`` prompts through the model at a time and accumulate. A contender is timed in CPU
seconds (device: clock), the first step left out; the ratio is of seconds a step. ``limit``: tokens through
the model, theirs over ours, what the ratio would be if time were tokens. Memory is measured in a process of
its own for ours and sdpo, all ``--memory-prompts`` at once: the peak of the process, and its rise above what
it held with its models loaded; ``memory_ratio`` is of the rises, ours over theirs.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor

from align3gr.console import say
from benchmarks.measuring import memory_mb, peak_mb
from policies.codec import ScidCodec
from policies.policy import Policy, write_policy
from trainer.preference.learner import Learner
from trainer.preference.loss import Responses, preference_loss
from trainer.preference.samples import Samples
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings
from trainer.sft.presets import open_backbone

SIZES, REJECTED, SEED = (256, 256, 256), 20, 7
END = 1
"""The end token that TRL writes behind an answer: the fourth of its tokens, for everybody."""
TOKENS = len(SIZES) + 1
STAGE = StageSettings(name="step", data="easy", beta=1.0, learning_rate=1e-3)
PAIRS = STAGE.model_copy(update={"loss": "dpo"})
OURS = 7
"""Steps of ours, which is quick: more of them make its time steadier."""
FOREVER = 10**9
"""Steps of the schedule: the rate does not move."""
CLOSE = 2e-4
"""Losses are sums of terms of order 10 in float32, after a few updates."""


@dataclass(frozen=True)
class Work:
    """What everybody trains with."""

    policy: Path
    samples: list[Samples]
    """A batch a step; sdpo and trl take the first ``steps``."""
    steps: int
    settings: PreferenceSettings
    at_once: int
    device: str

    def learner(self, stage: StageSettings) -> Learner:
        """The policy with new LoRA matrices, the same every time."""
        policy = Policy.load(self.policy, device=self.device, trainable=True)
        torch.manual_seed(SEED)
        return Learner(policy, stage, self.settings, Ranks())


@dataclass(frozen=True)
class Timed:
    """What a contender did."""

    seconds: float
    """A step."""
    losses: list[float]


def main() -> None:
    """Run the benchmark from the command line."""
    wanted = arguments()
    torch.set_num_threads(wanted.threads)
    logging.disable(logging.WARNING)
    if wanted.memory_of:
        print(json.dumps(memory_here(wanted)))
        return
    found: dict[str, dict[str, Any]] = {}
    for length in wanted.lengths:
        with tempfile.TemporaryDirectory() as place:
            found[str(length)] = measure(wanted, length, Path(place))
    names = ("ratio_sdpo", "ratio_sdpo_without_reference", "ratio_trl", "memory_ratio", "limit", "limit_trl")
    facts: dict[str, Any] = {name: {key: row[name] for key, row in found.items()} for name in names}
    facts |= {"backbone": wanted.backbone, "prompts": wanted.prompts, "rejected": REJECTED, "tokens": TOKENS}
    facts |= {"threads": wanted.threads, "measured": found}
    if wanted.json:
        print(json.dumps(facts))


def measure(wanted: argparse.Namespace, length: int, place: Path) -> dict[str, Any]:
    """All contenders on prompts of one length."""
    work = work_of(wanted, length, place, wanted.prompts, wanted.steps)
    mine, mine_pairs = ours(work, STAGE), ours(replace(work, samples=work.samples[: work.steps]), PAIRS)
    theirs, asking = sdpo(work)
    require_equal(mine.losses[: work.steps], theirs.losses)
    without = theirs.seconds - asking
    pairs = trl(work, place)
    require_equal(mine_pairs.losses, pairs.losses)
    tokens = length + (1 + REJECTED) * (TOKENS - 1)
    row: dict[str, Any] = {
        "ours_s": mine.seconds,
        "sdpo_s": theirs.seconds,
        "sdpo_without_reference_s": without,
        "trl_s": pairs.seconds,
        "loss": mine.losses,
        "ratio_sdpo": theirs.seconds / mine.seconds,
        "ratio_sdpo_without_reference": without / mine.seconds,
        "ratio_trl": pairs.seconds / mine.seconds,
        "limit": (1 + REJECTED) * (length + TOKENS) / tokens,
        "limit_trl": 2 * REJECTED * (length + TOKENS) / tokens,
    }
    memory = {name: memory_of(wanted, name, length) for name in ("ours", "sdpo")}
    row["memory_mb"] = memory
    row["memory_ratio"] = memory["ours"]["rise"] / memory["sdpo"]["rise"]
    say(
        f"prompt {length:4}  ours {mine.seconds:6.3f} s  sdpo {theirs.seconds:6.2f} s "
        f"{row['ratio_sdpo']:5.1f}x (limit {row['limit']:.1f}; without reference "
        f"{row['ratio_sdpo_without_reference']:.1f}x)  "
        f"trl {pairs.seconds:6.2f} s {row['ratio_trl']:5.1f}x (limit {row['limit_trl']:.1f})  "
        f"memory 1/{1 / row['memory_ratio']:.1f}"
    )
    return row


def work_of(wanted: argparse.Namespace, length: int, place: Path, prompts: int, steps: int) -> Work:
    """A policy directory and batches of samples, drawn."""
    random = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(random.choice(int(np.prod(SIZES)), 2000, replace=False), SIZES), axis=1)
    codec = ScidCodec([f"i{row}" for row in range(2000)], codes, SIZES, quantizer_hash="drawn")
    letters = random.choice(list("etaoinshrdlu"), size=(5000, 7))
    texts = ["".join(word) for word in letters]  # enough for the preset's whole vocabulary
    backbone = open_backbone(wanted.backbone, codec, texts, text_vocabulary=None, seed=0)
    write_policy(
        place / "v1", version="v1", model=backbone.model, tokenizer=backbone.tokenizer, codec=codec,
        popularity=codec.item_ids,
    )  # fmt: skip
    tokens = Policy.load(place / "v1").tokens
    words = np.concatenate(tokens.levels)
    batches = []
    for _ in range(max(OURS, steps)):
        items = [random.choice(codec.item_ids, 1 + REJECTED, replace=False).tolist() for _ in range(prompts)]
        answers = [[[*tokens.answer(item), END] for item in several] for several in items]
        asked = [[*random.choice(words, length - 1).tolist(), tokens.recommend] for _ in range(prompts)]
        batches.append(Samples.of([str(number) for number in range(prompts)], asked, answers))
    settings = PreferenceSettings(batch_size=prompts, micro_batch=prompts, warmup=0.0)
    return Work(place / "v1", batches, steps, settings, wanted.at_once, wanted.device)


def ours(work: Work, stage: StageSettings) -> Timed:
    """As a stage does: score every batch before the first step, then a step for each."""
    learner, asking, learning = work.learner(stage), Watch(work.device), Watch(work.device)
    references, losses = [], []
    for samples in work.samples:
        with asking:
            references.append(learner.responses(samples))
        asking.step()
    for done, (samples, reference) in enumerate(zip(work.samples, references, strict=True)):
        with learning:
            row = learner.step(samples, reference, list(range(len(samples))), done, FOREVER)
        learning.step()
        losses.append(row["loss"])
    return Timed(asking.seconds + learning.seconds, losses)


def sdpo(work: Work) -> tuple[Timed, float]:
    """The published loop: a padded sequence an answer, a second model for the reference.

    What it did, and the seconds a step that went into the reference.
    """
    learner, losses = work.learner(STAGE), []
    watch, asking = Watch(work.device), Watch(work.device)
    second = Policy.load(work.policy, device=work.device).model
    for samples in work.samples[: work.steps]:
        with watch:
            losses.append(sdpo_step(learner, second, samples, work.at_once, asking))
        watch.step()
        asking.step()
    return Timed(watch.seconds, losses), asking.seconds


def sdpo_step(learner: Learner, second: Any, samples: Samples, at_once: int, asking: "Watch") -> float:
    """Forward, reference, backward, clip, AdamW."""
    optimizer, total = learner._optimizer, 0.0
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, len(samples), at_once):
        numbers = list(range(start, min(start + at_once, len(samples))))
        ids, mask = padded(samples, numbers, learner.policy.device)
        scores = sequence_log_probs(learner.model, ids, mask).view(len(numbers), -1)
        with torch.no_grad(), asking:
            ref = sequence_log_probs(second, ids, mask).view(len(numbers), -1)
        there = torch.ones_like(scores[:, 1:], dtype=torch.bool)
        policy, reference = (
            Responses(one[:, 0], one[:, 1:], there, torch.zeros_like(one[:, 1:])) for one in (scores, ref)
        )
        loss = preference_loss(policy, reference, learner.stage, TOKENS).sum() / len(samples)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(learner.weights, learner.settings.gradient_norm)
    optimizer.step()
    return total


def padded(samples: Samples, numbers: list[int], device: Any) -> tuple[Tensor, Tensor]:
    """Every answer behind its prompt, padded on the right: ids and which of them belong to an answer."""
    rows = [(samples.prompts[n], answer) for n in numbers for answer in samples.answers[n]]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, len(prompt) : len(prompt) + len(answer)] = True
    return ids.to(device), mask.to(device)


def sequence_log_probs(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """As published: log softmax of the logits at every position, gathered, summed over the answer."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    each = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (each * mask[:, 1:]).sum(dim=1)


def trl(work: Work, place: Path) -> Timed:
    """DPOTrainer on all pairs of a batch a step."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    policy = Policy.load(work.policy, device=work.device)
    settings, watch = work.settings, Watch(work.device)
    text: Callable[[list[int]], str] = lambda ids: "".join(policy.tokenizer.convert_ids_to_tokens(ids))  # noqa: E731
    rows = [
        {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(other)}
        for samples in work.samples[: work.steps]
        for prompt, (chosen, *rejected) in zip(samples.prompts, samples.answers, strict=True)
        for other in rejected
    ]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_rank, lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout, target_modules=settings.lora_targets,
    )  # fmt: skip
    arguments = DPOConfig(
        output_dir=str(place / "trl"), use_cpu=work.device == "cpu", bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=work.at_once * REJECTED,
        gradient_accumulation_steps=settings.batch_size // work.at_once, max_steps=work.steps,
        train_sampling_strategy="sequential", beta=STAGE.beta, learning_rate=STAGE.learning_rate,
        lr_scheduler_type="constant", max_grad_norm=settings.gradient_norm, weight_decay=0.0,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        seed=SEED, dataloader_num_workers=0,
    )  # fmt: skip

    class Times(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.__enter__()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.__exit__()
            watch.step()

        def on_log(self, _args: Any, _state: Any, _control: Any, **more: Any) -> None:
            del more

    trainer = DPOTrainer(
        model=policy.model, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=policy.tokenizer, peft_config=config, callbacks=[Times()],
    )  # fmt: skip
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Timed(watch.seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row])


class Watch:
    """Adds up time inside ``with``; CPU seconds, or the clock's for a device that works beside the CPU."""

    def __init__(self, device: str) -> None:
        self._clock = time.process_time if device == "cpu" else self._synchronised
        self._sum, self._steps, self._began = 0.0, -1, 0.0

    def __enter__(self) -> None:
        self._began = self._clock()

    def __exit__(self, *_: object) -> None:
        self._sum += self._clock() - self._began

    def step(self) -> None:
        """A step is done; the first one's time does not count."""
        self._steps += 1
        if self._steps == 0:
            self._sum = 0.0

    @property
    def seconds(self) -> float:
        """A step."""
        return self._sum / self._steps

    @staticmethod
    def _synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()


def memory_of(wanted: argparse.Namespace, contender: str, length: int) -> dict[str, float]:
    """``memory_here`` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", contender, "--lengths", str(length)]
    command += ["--backbone", wanted.backbone, "--memory-prompts", str(wanted.memory_prompts)]
    command += ["--threads", str(wanted.threads), "--device", wanted.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_here(wanted: argparse.Namespace) -> dict[str, float]:
    """Peak of this process in two steps, and its rise above what it held before the first; MB."""
    with tempfile.TemporaryDirectory() as place:
        prompts = wanted.memory_prompts
        work = work_of(wanted, wanted.lengths[0], Path(place), prompts, 2)
        learner = work.learner(STAGE)
        second = Policy.load(work.policy, device=work.device).model if wanted.memory_of == "sdpo" else None
        on_cpu = work.device == "cpu"
        before = memory_mb("VmRSS") if on_cpu else torch.cuda.memory_allocated() / 2**20
        for done, samples in enumerate(work.samples[:2]):
            if second is not None:
                sdpo_step(learner, second, samples, prompts, Watch(work.device))
            else:
                reference = learner.responses(samples)
                learner.step(samples, reference, list(range(prompts)), done, FOREVER)
        peak = peak_mb() if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    return {"peak": peak, "rise": peak - before, "prompts": prompts}


def require_equal(ours: list[float], theirs: list[float]) -> None:
    """Raises AssertionError when the losses differ: then they did not do the same work."""
    worst = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    assert worst < CLOSE, f"losses differ by {worst}: {ours} and {theirs}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument(
        "--lengths", type=lambda text: [int(one) for one in text.split(",")], default=[60, 120, 240]
    )
    parser.add_argument("--prompts", type=int, default=8, help="samples an optimizer step learns from")
    parser.add_argument("--at-once", type=int, default=2, help="prompts that sdpo and trl take at a time")
    parser.add_argument("--memory-prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="the first is not timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "sdpo"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
