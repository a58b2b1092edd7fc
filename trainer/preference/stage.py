"""One preference stage: a policy learns from one table against itself as it was before the first step.

The reference's log-probabilities are computed once, by the policy itself before its first step (it *is* the
reference then), so no second model is held; they are kept on disk under a hash of what they depend on. The
LoRA matrices of an adapter go on being trained; a full policy gets new ones. What comes out is a policy
directory of kind adapter, on the same base.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from policies.codec import ScidCodec
from policies.policy import Policy, write_policy
from trainer.errors import TrainerError
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings

from .learner import Learner, as_responses
from .loss import METRIC_NAMES, Responses
from .samples import Samples, encode_samples

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
POLICY = "policy"

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
    """Gets metrics.jsonl, the reference's log-probabilities and policy/."""
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
    ``metrics.jsonl`` gets one line a step, as it happens. A policy that is there
    already is refused: clear the directory to run the stage again (the references may stay).

    Deterministic on CPU for a given seed and number of threads. Raises NotEnoughSamples below the stage's
    minimum, TrainerError for a loss that is not finite or memory that ran out.
    """
    run.out_dir.mkdir(parents=True, exist_ok=True)
    policy = Policy.load(start, device=run.device, policies=run.policies, codec=run.codec, trainable=True)
    samples = encode_samples(table, policy.tokens, settings.max_rejected)
    if len(samples) < stage.min_samples:
        raise NotEnoughSamples(
            f"stage {stage.name}: {len(samples)} samples, at least {stage.min_samples} are needed: wait for "
            "more feedback, or lower min_samples"
        )
    stop_samples = _stop_samples(stop_table, policy, settings)
    with _deterministic(run.seed):
        try:
            learner = Learner(policy, stage, settings, run.ranks)
            key, reference = _references(learner, samples, run)
            rows, last, stop_losses = _train(learner, samples, reference, stop_samples, run)
        except torch.OutOfMemoryError as error:
            raise TrainerError(
                f"stage {stage.name}: {run.device} is out of memory with micro_batch {settings.micro_batch}: "
                "lower trainer.preference.micro_batch (no result changes)"
            ) from error
    result = StageResult(
        stage=stage.name,
        policy=run.out_dir / POLICY,
        samples=len(samples),
        refused=samples.refused,
        steps=len(rows),
        learning_rate=learner.rate,
        reference=key,
        first={name: rows[0][name] for name in ("loss", *METRIC_NAMES)},
        last=last,
        stop_losses=tuple(stop_losses),
    )
    if run.ranks.leads:
        write_policy(
            result.policy,
            version=run.version,
            model=learner.model,
            tokenizer=policy.tokenizer,
            codec=policy.codec,
            popularity=_popularity_of(start) if popularity is None else popularity,
            base=policy.base,
            lineage={**(lineage or {}), "metrics": {stage.name: result.last}},
        )
    run.ranks.wait()
    return result


def _train(
    learner: Learner,
    samples: Samples,
    reference: Responses,
    stop_samples: Samples | None,
    run: StageRun,
) -> tuple[list[dict[str, float]], dict[str, float], list[float]]:
    """All epochs: the steps' metrics, the last epoch's mean, the stop losses. Ends at the best weights."""
    stage, settings = learner.stage, learner.settings
    epochs = [
        samples.epoch(settings.batch_size, np.random.default_rng([run.seed, epoch]))
        for epoch in range(stage.epochs)
    ]
    total = sum(len(batches) for batches in epochs)
    rows: list[dict[str, float]] = []
    last: dict[str, float] = {}
    stopper = _Stopper(learner, stop_samples) if stop_samples is not None else None
    with (run.out_dir / METRICS).open("w", encoding="utf-8") as file:
        for epoch, batches in enumerate(epochs):
            begin = len(rows)
            for batch in batches:
                rows.append({"epoch": epoch, **learner.step(samples, reference, batch, len(rows), total)})
                if run.ranks.leads:
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
                if run.observe is not None:
                    run.observe(len(rows), total)
            last = _mean(rows[begin:])
            if stopper is not None and stopper.is_over(settings.patience):
                log.info("stage stop stage=%s epoch=%d losses=%s", stage.name, epoch, stopper.losses)
                break
    if stopper is not None:
        learner.restore(stopper.best)
    return rows, last, stopper.losses if stopper is not None else []


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
    """Key and log-probabilities of the policy as it is now: read from disk, or computed and kept there."""
    from safetensors.torch import load_file, save_file

    policy = learner.policy
    base = policy.base.sha256 if policy.base is not None else None
    weights = {n: h for n, h in policy.manifest.files.items() if n.endswith(".safetensors")}
    facts = [base, weights, samples.fingerprint, policy.device.type]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    file = run.out_dir / f"references-{key[:16]}.safetensors"
    if file.exists():
        scores = load_file(file)["log_probs"].to(policy.device)
        run.ranks.wait()
        return key, as_responses(scores, samples)
    found = learner.responses(samples)
    run.ranks.wait()
    if run.ranks.leads:
        temporary = file.with_suffix(".partial")
        scores = torch.cat([found.chosen.unsqueeze(1), found.rejected], dim=1)
        save_file({"log_probs": scores.cpu()}, temporary)
        temporary.replace(file)
    return key, found


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in ("loss", *METRIC_NAMES)}


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
