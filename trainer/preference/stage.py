"""One preference stage: a policy learns from one table against itself as it was before the first step.

The reference's log-probabilities are computed once, by the policy itself before its first step (it *is* the
reference then), so no second model is held; they are kept on disk under a hash of what they depend on, and
read by nobody else. The LoRA matrices of an adapter go on being trained; a full policy gets new ones. What
comes out is a policy directory of kind adapter, on the same base.

Nothing random is carried from step to step, so a stage that was interrupted goes on from its last checkpoint
and ends with the same bits (CPU).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from policies.codec import ScidCodec
from policies.policy import Policy, write_policy
from trainer.checkpoint import Checkpoint
from trainer.errors import TrainerError
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings
from trainer.sft.lora import seeded

from .learner import Learner, mask_of
from .loss import METRIC_NAMES, Responses
from .samples import Samples, encode_samples

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
POLICY = "policy"
CHECKPOINT = "checkpoint"

Observe = Callable[[int, int], None]
"""Told (steps done, steps in all)."""


@dataclass(frozen=True)
class StageResult:
    """What a finished stage did."""

    stage: str
    policy: Path
    """Directory of the policy it ended with."""
    samples: int
    refused: dict[str, int]
    """Samples of the table that could not be learned from, by reason."""
    steps: int
    learning_rate: float
    reference: str
    """Key of the reference's log-probabilities: a hash of the policy and of the samples."""
    first: dict[str, float]
    """Metrics of the first step."""
    last: dict[str, float]
    """Metrics of the last epoch, averaged over its steps."""
    stop_losses: tuple[float, ...] = ()
    """Loss on the stop users before the first step and after each epoch; empty without early stopping."""

    def as_dict(self) -> dict[str, Any]:
        """For the round's state: without the path, which is not part of what was learned."""
        facts = asdict(self)
        del facts["policy"]
        return facts


class NotEnoughSamples(TrainerError):  # noqa: N818 - reads as what it is at the raise site
    """A stage has fewer samples than its minimum: it is skipped."""


@dataclass(frozen=True)
class StageRun:
    """Where and how a stage runs, besides its settings."""

    out_dir: Path
    """Gets metrics.jsonl, the reference's log-probabilities, policy/, and checkpoint/ until it is done."""
    version: str
    """Name in the new policy's manifest until a registry numbers it."""
    seed: int
    device: str = "cpu"
    policies: Path | None = None
    """Where bases lie, when not beside the policy."""
    codec: ScidCodec | None = None
    """The policy's codec grown by new items (trainer.newcomers); none: the policy's own."""
    ranks: Ranks = field(default_factory=Ranks)
    observe: Observe | None = None


def run_stage(
    start: Path,
    table: pa.Table,
    stage: StageSettings,
    settings: PreferenceSettings,
    run: StageRun,
    *,
    stop_table: pa.Table | None = None,
    popularity: Sequence[str] | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> StageResult:
    """Train the policy in ``start`` on ``table`` and write the result to ``run.out_dir/policy``.

    ``table``: a PreferenceDataset's stage. ``stop_table``: samples of the stop users, for
    ``settings.patience``. ``popularity``: the new policy's, most liked first; default the old one's.
    ``metrics.jsonl`` gets one line a step, as it happens. A policy that is there already is refused: clear
    the directory to run the stage again (the references may stay). A checkpoint of the same stage is
    continued.

    Deterministic on CPU for a given seed and number of threads. Raises NotEnoughSamples below the stage's
    minimum, BrokenSamples for a table that cannot be, TrainerError for a loss that is not finite or memory
    that does not take one sample.
    """
    run.out_dir.mkdir(parents=True, exist_ok=True)
    policy = Policy.load(start, device=run.device, policies=run.policies, codec=run.codec, trainable=True)
    samples = encode_samples(table, policy.tokens, settings.max_rejected)
    if len(samples) < stage.min_samples:
        left_out = "".join(f" ({count} left out: {reason})" for reason, count in samples.refused.items())
        raise NotEnoughSamples(
            f"stage {stage.name}: {len(samples)} samples{left_out}, at least {stage.min_samples} are needed: "
            "wait for more feedback, or lower min_samples"
        )
    stop_samples = _stop_samples(stop_table, policy, settings)
    with _deterministic(run.seed):
        learner = Learner(policy, stage, settings, run.ranks)
        key, reference = _references(learner, samples, run)
        kept = Checkpoint(run.out_dir / CHECKPOINT, _run_key(key, samples, stop_samples, learner, run))
        training = _Training(learner, samples, reference, stop_samples, run, kept)
        training.run()
    result = StageResult(
        stage=stage.name,
        policy=run.out_dir / POLICY,
        samples=len(samples),
        refused=samples.refused,
        steps=len(training.rows),
        learning_rate=learner.rate,
        reference=key,
        first={name: training.rows[0][name] for name in ("loss", *METRIC_NAMES)},
        last=training.last,
        stop_losses=training.stop_losses,
    )
    if run.ranks.leads:
        write_policy(
            result.policy,
            version=run.version,
            model=learner.finished(),
            tokenizer=policy.tokenizer,
            codec=policy.codec,
            popularity=_popularity_of(start) if popularity is None else popularity,
            base=policy.base,
            lineage={**(lineage or {}), "metrics": {stage.name: result.last}},
        )
        kept.clear()
    run.ranks.wait()
    return result


class _Training:
    """All epochs of a stage, from the first step or from a checkpoint; ends at the best weights."""

    def __init__(
        self,
        learner: Learner,
        samples: Samples,
        reference: Responses,
        stop_samples: Samples | None,
        run: StageRun,
        kept: Checkpoint,
    ) -> None:
        self._learner, self._samples, self._reference = learner, samples, reference
        self._run, self._kept = run, kept
        self._stopper = _Stopper(learner, stop_samples) if stop_samples is not None else None
        self._over = False
        """Whether the stop users have had enough."""
        self.rows: list[dict[str, float]] = []
        """Metrics of the steps."""

    @property
    def last(self) -> dict[str, float]:
        """Metrics of the last epoch, averaged over its steps."""
        rows = [row for row in self.rows if row["epoch"] == self.rows[-1]["epoch"]]
        return {name: float(np.mean([row[name] for row in rows])) for name in ("loss", *METRIC_NAMES)}

    @property
    def stop_losses(self) -> tuple[float, ...]:
        """Of the stop users, before the first step and after each epoch."""
        return tuple(self._stopper.losses) if self._stopper is not None else ()

    def run(self) -> None:
        """Every step that is not done yet."""
        stage, settings, run = self._learner.stage, self._learner.settings, self._run
        epochs = [
            self._samples.epoch(settings.batch_size, np.random.default_rng([run.seed, epoch]))
            for epoch in range(stage.epochs)
        ]
        plan = [(e, n, batch) for e, batches in enumerate(epochs) for n, batch in enumerate(batches)]
        self._resume()
        for step, (epoch, number, batch) in enumerate(plan[len(self.rows) :], start=len(self.rows) + 1):
            if self._over:
                break
            with seeded(run.seed, epoch, number):
                metrics = self._learner.step(self._samples, self._reference, batch, step - 1, len(plan))
            self._note({"epoch": epoch, **metrics})
            epoch_ends = number + 1 == len(epochs[epoch])
            if epoch_ends and self._stopper is not None and self._stopper.is_over(settings.patience):
                self._over = True
                log.info("stage stop stage=%s epoch=%d losses=%s", stage.name, epoch, self.stop_losses)
            if epoch_ends if not settings.checkpoint_every else step % settings.checkpoint_every == 0:
                self._keep()
            if run.observe is not None:
                run.observe(step, len(plan))
        if self._stopper is not None:
            self._learner.restore(self._stopper.best)

    def _note(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self._run.ranks.leads:
            with (self._run.out_dir / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _keep(self) -> None:
        """A checkpoint of where the stage stands."""
        if not self._run.ranks.leads:
            return
        states = self._learner.state()
        if self._stopper is not None:
            states["best"] = self._stopper.best
        self._kept.save({"rows": self.rows, "over": self._over, "stop_losses": self.stop_losses}, states)

    def _resume(self) -> None:
        """Put back what the last checkpoint kept, if there is one of this stage, and its steps' metrics."""
        saved = self._kept.load(self._learner.policy.device)
        if saved is not None:
            self._learner.load_state(saved.states)
            self.rows, self._over = list(saved.facts["rows"]), saved.facts["over"]
            if self._stopper is not None:
                self._stopper.losses = list(saved.facts["stop_losses"])
                self._stopper.best = saved.states["best"]
            log.info("stage resumed stage=%s step=%d", self._learner.stage.name, len(self.rows))
        self._run.ranks.wait()
        if self._run.ranks.leads:
            lines = "".join(json.dumps(row) + "\n" for row in self.rows)
            (self._run.out_dir / METRICS).write_text(lines, encoding="utf-8")


class _Stopper:
    """Watches the loss on the stop users; ``best`` holds the weights of its lowest value."""

    def __init__(self, learner: Learner, samples: Samples) -> None:
        self._learner, self._samples = learner, samples
        self._reference = learner.responses(samples)
        self.losses = [learner.loss_on(samples, self._reference)]
        self.best = learner.snapshot()

    def is_over(self, patience: int) -> bool:
        """Measure once more; whether the last ``patience`` epochs brought nothing lower."""
        self.losses.append(self._learner.loss_on(self._samples, self._reference))
        if self.losses[-1] == min(self.losses):
            self.best = self._learner.snapshot()
        return len(self.losses) - 1 - int(np.argmin(self.losses)) >= patience


def _stop_samples(table: pa.Table | None, policy: Policy, settings: PreferenceSettings) -> Samples | None:
    if not settings.patience or table is None:
        return None
    samples = encode_samples(table, policy.tokens, settings.max_rejected)
    return samples if len(samples) else None


def _popularity_of(directory: Path) -> list[str]:
    items: list[str] = json.loads((directory / "popularity.json").read_text(encoding="utf-8"))
    return items


def _references(learner: Learner, samples: Samples, run: StageRun) -> tuple[str, Responses]:
    """Key and log-probabilities of the policy as it is now: read from disk, or computed and kept there.

    The key is a hash of the policy's weights and of the samples. It stands in the file too: a file under the
    name of this one that another policy or other samples filled, or that is damaged, is computed anew.
    """
    policy = learner.policy
    base = policy.base.sha256 if policy.base is not None else None
    weights = {n: h for n, h in policy.manifest.files.items() if n.endswith(".safetensors")}
    facts = [base, weights, samples.fingerprint, policy.device.type]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = run.out_dir / f"references-{key[:16]}.safetensors"
    found = _read_references(file, key, mask_of(samples))
    run.ranks.wait()
    if found is not None:
        place = policy.device
        return key, Responses(*(getattr(found, each.name).to(place) for each in fields(Responses)))
    computed = learner.responses(samples)
    if run.ranks.leads:
        _write_references(file, key, computed)
    return key, computed


def _read_references(file: Path, key: str, mask: Tensor) -> Responses | None:
    """What ``_write_references`` wrote under this key, for samples of this shape; none when there is none."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            written = (stored.metadata() or {}).get("key")
            scores, fork = stored.get_tensor("log_probs"), stored.get_tensor("forks")
    except SafetensorError as error:
        log.warning("references=%s damaged=%r action=compute_again", file, " ".join(str(error).split()))
        return None
    if written != key or scores.shape != (len(mask), mask.shape[1] + 1) or fork.shape != mask.shape:
        log.warning("references=%s belong_to_another_policy=true action=compute_again", file)
        return None
    return Responses(scores[:, 0], scores[:, 1:], mask, fork)


def _write_references(file: Path, key: str, found: Responses) -> None:
    from safetensors.torch import save_file

    scores = torch.cat([found.chosen.unsqueeze(1), found.rejected], dim=1)
    temporary = file.with_suffix(".partial")
    save_file({"log_probs": scores.cpu(), "forks": found.fork.cpu()}, temporary, metadata={"key": key})
    temporary.replace(file)


def _run_key(
    references: str, samples: Samples, stop_samples: Samples | None, learner: Learner, run: StageRun
) -> str:
    """Names a stage by all that determines what it ends with: nobody continues another one's checkpoint."""
    changes_nothing = {"stages", "micro_batch", "gradient_checkpointing", "checkpoint_every"}
    facts = [
        references,
        hashlib.sha256(samples.weights.tobytes()).hexdigest(),
        stop_samples and stop_samples.fingerprint,
        learner.stage.model_dump(mode="json"),
        learner.settings.model_dump(mode="json", exclude=changes_nothing),
        run.seed,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seeded, with deterministic kernels; the process's own state comes back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_rng_state(state)
