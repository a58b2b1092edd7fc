"""Beside TRL: its DPO trainer walks the same 50 steps as ours, and trains on what we export."""

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from policies.export import export_policy
from policies.policy import Policy
from tests.trainer.test_stage import preference_table
from trainer.errors import UnusableFile
from trainer.preference.learner import Learner
from trainer.preference.loss import Responses
from trainer.preference.samples import Samples, encode_samples
from trainer.preference.trl_data import export_preferences
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, BATCH = 50, 4
STAGE = StageSettings(name="pairs", data="easy", beta=0.3, learning_rate=3e-3)
SETTINGS = PreferenceSettings(stages=(STAGE,), batch_size=BATCH, lora_rank=4, lora_alpha=8, warmup=0.0)


def test_with_one_rejected_fifty_steps_are_those_of_trls_trainer(policies: Path, tmp_path: Path) -> None:
    """The same loss, gradient norm and metrics at every step: one other update would show in all later."""
    policy = Policy.load(policies / "v1", trainable=True)
    out = tmp_path / "pairs.jsonl"
    export_preferences(preference_table(STEPS * BATCH), policy, out, max_rejected=1)
    torch.manual_seed(3)
    learner = Learner(policy, STAGE, SETTINGS, Ranks())
    model = deepcopy(learner.model)  # before ours is trained: the same LoRA matrices
    ours = our_steps(
        learner, with_end_token(encode_samples(preference_table(STEPS * BATCH), policy.tokens, 1))
    )
    theirs = trl_steps(model, policy.tokenizer, out, tmp_path)

    assert len(ours) == len(theirs) == STEPS
    names = {"loss", "grad_norm", *(name for name in ours[0] if name.startswith(("rewards", "logps")))}
    names &= theirs[0].keys()
    assert len(names) == 8
    for mine, other in zip(ours, theirs, strict=True):
        # Before the first update all rewards are 0 but for rounding, so who outscores whom is a toss.
        for name in names - ({"rewards/accuracies"} if mine["step"] == 1 else set()):
            # TRL's Trainer rounds what it logs to about four digits; log-probabilities are of order 10.
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), (mine["step"], name)
    assert np.mean([row["rewards/margins"] for row in ours[-10:]]) > 0.2  # they went somewhere


def test_plain_trl_trains_on_what_is_exported(policies: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_policy(policies / "v1", tmp_path / "plain")
    table = preference_table(8)
    done = export_preferences(table, Policy.load(policies / "v1"), tmp_path / "pairs.parquet")
    assert done.rows == sum(len(row) for row in table.column("rejected").to_pylist())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    rows = trl_steps(model, tokenizer, tmp_path / "pairs.parquet", tmp_path, steps=3)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[2]["rewards/margins"] > 0


def test_a_row_a_sample_lists_what_it_rejects(policies: Path, tmp_path: Path) -> None:
    policy, table = Policy.load(policies / "v1"), preference_table(6)
    export_preferences(table, policy, tmp_path / "lists.jsonl", rows="lists", max_rejected=3)
    export_preferences(table, policy, tmp_path / "lists.parquet", rows="lists", max_rejected=3)
    rows = [json.loads(line) for line in (tmp_path / "lists.jsonl").read_text().splitlines()]
    assert rows == pq.read_table(tmp_path / "lists.parquet").to_pylist()
    given = table.to_pylist()
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in given]
    assert [len(row["rejected"]) for row in rows] == [min(3, len(row["rejected"])) for row in given]
    read = policy.tokenizer(rows[0]["rejected"])["input_ids"]
    assert read == [policy.tokens.answer(item) for item in given[0]["rejected"][:3]]


def test_a_file_that_is_there_or_of_another_kind_is_refused(policies: Path, tmp_path: Path) -> None:
    policy = Policy.load(policies / "v1")
    with pytest.raises(UnusableFile, match=r"neither \.jsonl nor \.parquet"):
        export_preferences(preference_table(2), policy, tmp_path / "pairs.csv")
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(UnusableFile, match="exists already"):
        export_preferences(preference_table(2), policy, tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_text() == "mine"


def with_end_token(samples: Samples) -> Samples:
    """The same samples with the end token behind every answer: what TRL makes of plain text."""
    answers = [[[*answer, 1] for answer in several] for several in samples.answers]
    return Samples.of(samples.ids, samples.prompts, answers)


def our_steps(learner: Learner, samples: Samples) -> list[dict[str, float]]:
    """Our steps over the samples in their order."""
    reference: Responses = learner.responses(samples)
    return [
        learner.step(samples, reference, list(batch), number, STEPS)
        for number, batch in enumerate(np.arange(len(samples)).reshape(STEPS, BATCH).tolist())
    ]


def trl_steps(
    model: Any, tokenizer: Any, file: Path, place: Path, steps: int = STEPS
) -> Sequence[dict[str, float]]:
    """What TRL's own trainer logs, step by step, over the file's rows in their order."""
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(place / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=BATCH, max_steps=steps, train_sampling_strategy="sequential",
        beta=STAGE.beta, learning_rate=STAGE.learning_rate or 0.0, lr_scheduler_type="cosine",
        warmup_steps=0, max_grad_norm=SETTINGS.gradient_norm, weight_decay=0.0,
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_num_workers=0,
    )  # fmt: skip
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=dataset(file), processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "rewards/margins" in row]


def dataset(file: Path) -> Any:
    """The rows as a user of TRL reads them."""
    from datasets import Dataset

    def rows() -> Iterator[dict[str, Any]]:
        if file.suffix == ".parquet":
            yield from pq.read_table(file).to_pylist()
        else:
            yield from map(json.loads, file.read_text().splitlines())

    return Dataset.from_list(list(rows()))
