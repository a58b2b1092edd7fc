"""What a stage can be asked for: weights, other losses, less memory; and a device that has too little."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from policies.policy import Policy
from tests.trainer.test_stage import EASY, FEW, SETTINGS, a_run, metrics_of, preference_table, scores_of
from trainer.errors import BrokenSamples, TrainerError
from trainer.preference.learner import Learner
from trainer.preference.samples import encode_samples
from trainer.preference.stage import run_stage
from trainer.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_say_how_much_a_sample_counts(policies: Path, tmp_path: Path) -> None:
    """A weight of 2 for one and nearly none for its neighbours gives the loss of that one."""
    table = preference_table(16)
    plain = run_stage(policies / "v1", table, FEW, SETTINGS, a_run(tmp_path / "plain", policies))
    ones = table.append_column("weight", pa.array([1.0] * 16))
    same = run_stage(policies / "v1", ones, FEW, SETTINGS, a_run(tmp_path / "ones", policies))
    assert same.first == plain.first
    heavy = table.append_column("weight", pa.array([2.0 if n == 5 else 1e-9 for n in range(16)]))
    anchored = FEW.model_copy(update={"anchor": 1.0})
    one = run_stage(policies / "v1", heavy, anchored, SETTINGS, a_run(tmp_path / "heavy", policies))
    scores = scores_of(Policy.load(policies / "v1"), table.slice(5, 1))[0]
    rejected = len(table.column("rejected")[5])
    assert one.first["loss"] == pytest.approx(np.log(1 + rejected) - float(scores[0]) / 3, abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), None])
def test_a_weight_that_is_none_is_an_error(weight: float | None, policies: Path, tmp_path: Path) -> None:
    weights = pa.array([1.0] * 10 + [weight] + [1.0] * 9, pa.float64())
    table = preference_table(20).append_column("weight", weights)
    with pytest.raises(BrokenSamples, match="s0010 has weight"):
        run_stage(policies / "v1", table, EASY, SETTINGS, a_run(tmp_path, policies))


def test_gradient_checkpointing_changes_no_result(policies: Path, tmp_path: Path) -> None:
    less = SETTINGS.model_copy(update={"gradient_checkpointing": True})
    table = preference_table(40)
    result = run_stage(policies / "v1", table, FEW, less, a_run(tmp_path / "less", policies))
    plain = run_stage(policies / "v1", table, FEW, SETTINGS, a_run(tmp_path / "all", policies))
    assert metrics_of(tmp_path / "less") == metrics_of(tmp_path / "all")
    weights = "adapter/adapter_model.safetensors"
    assert (result.policy / weights).read_bytes() == (plain.policy / weights).read_bytes()


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_other_losses_teach_the_same_lesson(loss: str, policies: Path, tmp_path: Path) -> None:
    stage = FEW.model_copy(update={"loss": loss, "beta": 0.5})
    result = run_stage(policies / "v1", preference_table(120), stage, SETTINGS, a_run(tmp_path, policies))
    assert metrics_of(tmp_path)[-1]["rewards/margins"] > 0.1
    assert result.last["loss"] < result.first["loss"]


@pytest.fixture
def small_learner(policies: Path) -> Learner:
    torch.manual_seed(7)
    return Learner(Policy.load(policies / "v1", trainable=True), EASY, SETTINGS, Ranks())


def no_more_than(learner: Learner, rows: int) -> None:
    """A device that holds the activations of so many samples at once."""

    def check(module: object, inputs: object, given: dict[str, torch.Tensor]) -> None:
        if len(given["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    decoder = learner.model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(check, with_kwargs=True)


def test_where_memory_runs_out_the_micro_batch_is_halved_and_said(
    small_learner: Learner, policies: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = encode_samples(preference_table(16), small_learner.policy.tokens, 20)
    torch.manual_seed(7)
    roomy = Learner(Policy.load(policies / "v1", trainable=True), EASY, SETTINGS, Ranks())
    no_more_than(small_learner, 5)
    batch = list(range(16))
    learners = (small_learner, roomy)
    references = [learner.responses(samples) for learner in learners]
    for learner, reference in zip(learners, references, strict=True):
        learner.step(samples, reference, batch, 0, 2)
    mine, other = (
        learner.step(samples, reference, batch, 1, 2)
        for learner, reference in zip(learners, references, strict=True)
    )
    assert small_learner.micro_batch == 4
    assert "out_of_memory=true device=cpu micro_batch=8 result=unchanged" in caplog.text
    assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_memory_that_takes_no_sample_is_an_error(small_learner: Learner) -> None:
    samples = encode_samples(preference_table(16), small_learner.policy.tokens, 20)
    no_more_than(small_learner, 0)
    with pytest.raises(TrainerError, match="out of memory with one sample at a time: set trainer"):
        small_learner.responses(samples)
