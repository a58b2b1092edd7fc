"""One preference stage on a real tiny policy: what it learns, what it writes, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from policies.policy import Policy
from policies.scoring import answer_log_probs, pack
from tests.policies.factory import item_ids, write_tiny_policy
from trainer.errors import BrokenSamples, TrainerError
from trainer.preference.samples import encode_samples
from trainer.preference.stage import METRICS, NotEnoughSamples, StageRun, run_stage
from trainer.settings import PreferenceSettings, StageSettings

TRAJECTORY = Path(__file__).with_name("preference_trajectory.json")
EASY = StageSettings(name="easy", data="easy", learning_rate=5e-3, epochs=3, min_samples=8)
HARD = StageSettings(name="hard", data="hard", learning_rate=5e-3, epochs=2, min_samples=8, beta=0.5)
SETTINGS = PreferenceSettings(stages=(EASY, HARD), batch_size=16, micro_batch=16, lora_rank=4, lora_alpha=8)


def preference_table(count: int, seed: int = 0, items: int = 60) -> pa.Table:
    """Users like the items of the lower half and reject 1 to 20 of the upper half."""
    random = np.random.default_rng(seed)
    names = item_ids(200)[:items]
    likes, rejects = names[: items // 2], names[items // 2 :]
    rows = [
        {
            "sample_id": f"s{number:04d}",
            "user_id": f"u{number % 37}",
            "history": random.choice(likes, random.integers(0, 12), replace=False).tolist(),
            "chosen": str(random.choice(likes)),
            "rejected": random.choice(rejects, random.integers(1, 21), replace=False).tolist(),
        }
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def chain(policies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Easy, then hard from where easy ended; the folder holds easy/ and hard/."""
    out = tmp_path_factory.mktemp("chain")
    torch.set_num_threads(1)
    run_stage(policies / "v1", preference_table(120), EASY, SETTINGS, a_run(out / "easy", policies))
    run_stage(out / "easy" / "policy", preference_table(90, 1), HARD, SETTINGS, a_run(out / "hard", policies))
    return out


FEW = EASY.model_copy(update={"epochs": 1})


def a_run(out: Path, policies: Path, **changes: object) -> StageRun:
    return StageRun(**{"out_dir": out, "version": "candidate", "seed": 7, "policies": policies, **changes})  # type: ignore[arg-type]


def metrics_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def scores_of(policy: Policy, table: pa.Table) -> torch.Tensor:
    """Naively, one sample at a time: log pi of chosen then rejected, [N, 21]."""
    samples = encode_samples(table, policy.tokens, 20)
    found = torch.zeros(len(samples), 21)
    with torch.no_grad():
        for number, (prompt, answers) in enumerate(zip(samples.prompts, samples.answers, strict=True)):
            batch = pack([prompt], [answers], policy.tokens.pad)
            found[number, : len(answers)] = answer_log_probs(policy.model, batch)[0]
    return found


def test_a_stage_learns_to_prefer_what_users_liked(chain: Path) -> None:
    rows = metrics_of(chain / "easy")
    assert [row["step"] for row in rows] == list(range(1, 25))
    # Policy and reference are the same before the first step: rewards of zero.
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["rewards/accuracies"] > 0.9


def test_the_learning_rate_warms_up_and_falls_to_zero(chain: Path) -> None:
    rates = [row["learning_rate"] for row in metrics_of(chain / "easy")]
    assert rates[1] == pytest.approx(EASY.learning_rate)
    assert rates[0] == pytest.approx(0.5 * rates[1])
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 0.02 * rates[1]


def test_the_hard_stages_reference_is_the_easy_policy(chain: Path, policies: Path) -> None:
    from safetensors.torch import load_file

    (file,) = (chain / "hard").glob("references-*.safetensors")
    references = load_file(file)["log_probs"]
    easy = scores_of(Policy.load(chain / "easy" / "policy", policies=policies), preference_table(90, 1))
    base = scores_of(Policy.load(policies / "v1"), preference_table(90, 1))
    torch.testing.assert_close(references, easy[:, : references.shape[1]], atol=2e-4, rtol=0)
    assert (references - base[:, : references.shape[1]]).abs().max() > 1.0


def test_an_adapter_loads_with_plain_peft_and_gives_equal_logits(chain: Path, policies: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    directory = chain / "hard" / "policy"
    base = AutoModelForCausalLM.from_pretrained(policies / "v1" / "model")
    plain = PeftModel.from_pretrained(base, str(directory / "adapter")).eval()
    ours = Policy.load(directory, policies=policies)
    assert ours.manifest.kind == "adapter"
    assert ours.manifest.base is not None
    assert ours.manifest.base.version == "v1"
    ids = torch.tensor([[0, *ours.tokens.answer("item-003"), ours.tokens.recommend]])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, ours.model(ids).logits)
        assert not torch.equal(plain(ids).logits, Policy.load(policies / "v1").model(ids).logits)


def test_the_chain_trains_one_adapter_further(chain: Path) -> None:
    configs = [
        json.loads((chain / stage / "policy" / "adapter" / "adapter_config.json").read_text())
        for stage in ("easy", "hard")
    ]
    assert configs[0] == configs[1]


def test_the_same_seed_gives_the_same_stage_bit_for_bit(chain: Path, policies: Path, tmp_path: Path) -> None:
    again = run_stage(
        policies / "v1", preference_table(120), EASY, SETTINGS, a_run(tmp_path / "easy", policies)
    )
    assert (tmp_path / "easy" / METRICS).read_bytes() == (chain / "easy" / METRICS).read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (again.policy / weights).read_bytes() == (chain / "easy" / "policy" / weights).read_bytes()
    other = a_run(tmp_path / "other", policies, seed=8)
    run_stage(policies / "v1", preference_table(120), EASY, SETTINGS, other)
    assert metrics_of(tmp_path / "other") != metrics_of(tmp_path / "easy")


def test_references_on_disk_are_used_and_belong_to_one_policy(
    chain: Path, policies: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "easy"
    out.mkdir()
    (file,) = (chain / "easy").glob("references-*")
    shutil.copy(file, out)
    run_stage(policies / "v1", preference_table(120), EASY, SETTINGS, a_run(out, policies))
    assert (out / METRICS).read_bytes() == (chain / "easy" / METRICS).read_bytes()
    # Another policy, or other samples, never read them.
    (hard_file,) = (chain / "hard").glob("references-*")
    assert hard_file.name != file.name


def test_references_of_another_policy_under_this_ones_name_are_computed_again(
    chain: Path, policies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder put together by hand, or a file cut short: never used, whatever its name says."""
    import shutil

    (right,), (wrong,) = ((chain / stage).glob("references-*") for stage in ("easy", "hard"))
    for content in (wrong.read_bytes(), right.read_bytes()[:-100]):
        out = tmp_path / str(len(content))
        out.mkdir()
        (out / right.name).write_bytes(content)
        run_stage(policies / "v1", preference_table(120), FEW, SETTINGS, a_run(out, policies))
        assert (out / right.name).read_bytes() == right.read_bytes()
        shutil.rmtree(out)
    assert "belong_to_another_policy=true" in caplog.text
    assert "damaged=" in caplog.text


def test_micro_batches_change_no_result(chain: Path, policies: Path, tmp_path: Path) -> None:
    small = SETTINGS.model_copy(update={"micro_batch": 5})
    run_stage(policies / "v1", preference_table(120), EASY, small, a_run(tmp_path, policies))
    for ours, theirs in zip(metrics_of(tmp_path), metrics_of(chain / "easy"), strict=True):
        # Sums in another order, through 24 steps of AdamW.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)


@pytest.mark.parametrize("style", ["qwen", "gemma"])
def test_other_model_families_learn_too(style: str, tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "v1", style=style)
    result = run_stage(
        tmp_path / "v1", preference_table(60), EASY, SETTINGS, a_run(tmp_path / "easy", tmp_path)
    )
    assert result.last["loss"] < result.first["loss"]


def test_the_anchor_keeps_the_chosen_response_likely(chain: Path, policies: Path, tmp_path: Path) -> None:
    anchored = EASY.model_copy(update={"anchor": 1.0})
    result = run_stage(policies / "v1", preference_table(120), anchored, SETTINGS, a_run(tmp_path, policies))
    plain = metrics_of(chain / "easy")
    assert result.last["logps/chosen"] > np.mean([row["logps/chosen"] for row in plain[-8:]])


def test_early_stopping_ends_at_the_best_weights(policies: Path, tmp_path: Path) -> None:
    # What the stop users chose is what the others reject: every epoch makes it worse for them.
    opposite = preference_table(40, 2).to_pylist()
    for row in opposite:
        row["chosen"], row["rejected"] = row["rejected"][0], [row["chosen"]]
    patient = SETTINGS.model_copy(update={"patience": 1})
    result = run_stage(
        policies / "v1", preference_table(120), EASY, patient, a_run(tmp_path, policies),
        stop_table=pa.Table.from_pylist(opposite),
    )  # fmt: skip
    assert len(result.stop_losses) == 2
    assert result.stop_losses[0] < result.stop_losses[1]
    assert result.steps == 8
    base, after = Policy.load(policies / "v1"), Policy.load(result.policy, policies=policies)
    table = preference_table(10, 3)
    torch.testing.assert_close(scores_of(after, table), scores_of(base, table), atol=1e-4, rtol=0)


def test_items_without_a_scid_are_left_out_and_counted(policies: Path) -> None:
    rows = preference_table(20).to_pylist()
    rows[0]["chosen"] = "unheard-of"
    rows[1]["rejected"] = ["unheard-of"]
    rows[2]["rejected"] = ["unheard-of", "item-059"]
    rows[3]["history"] = ["unheard-of", "item-001"]
    tokens = Policy.load(policies / "v1").tokens
    samples = encode_samples(pa.Table.from_pylist(rows), tokens, 20)
    assert len(samples) == 18
    assert sum(samples.refused.values()) == 2
    assert samples.answers[0] == [tokens.answer(rows[2]["chosen"]), tokens.answer("item-059")]
    assert samples.prompts[1] == [*tokens.begin, *tokens.answer("item-001"), tokens.recommend]


def test_a_sample_that_rejects_its_chosen_item_is_an_error(policies: Path, tmp_path: Path) -> None:
    rows = preference_table(20).to_pylist()
    rows[4]["rejected"].append(rows[4]["chosen"])
    with pytest.raises(BrokenSamples, match="s0004 rejects the item"):
        run_stage(policies / "v1", pa.Table.from_pylist(rows), EASY, SETTINGS, a_run(tmp_path, policies))


def test_a_stage_below_its_minimum_says_so(policies: Path, tmp_path: Path) -> None:
    with pytest.raises(NotEnoughSamples, match="stage easy: 7 samples, at least 8 are needed"):
        run_stage(policies / "v1", preference_table(7), EASY, SETTINGS, a_run(tmp_path, policies))
    assert not (tmp_path / "policy").exists()


def test_a_stage_without_an_item_of_the_codec_says_so(policies: Path, tmp_path: Path) -> None:
    rows = [row | {"chosen": "unheard-of"} for row in preference_table(20).to_pylist()]
    with pytest.raises(NotEnoughSamples, match=r"0 samples \(20 left out: chosen item has no SCID in this"):
        run_stage(policies / "v1", pa.Table.from_pylist(rows), EASY, SETTINGS, a_run(tmp_path, policies))


def test_a_loss_that_is_not_finite_is_an_error_and_writes_no_policy(policies: Path, tmp_path: Path) -> None:
    wild = EASY.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainerError, match="lower the stage's learning_rate"):
        run_stage(policies / "v1", preference_table(60), wild, SETTINGS, a_run(tmp_path, policies))
    assert not (tmp_path / "policy").exists()


class Killed(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("patience", [0, 3])
def test_a_stage_goes_on_from_where_it_was_interrupted(
    patience: int, chain: Path, policies: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"checkpoint_every": 5, "patience": patience})
    stop = preference_table(10, 3) if patience else None

    def run(out: Path, observe: object = None) -> None:
        given = a_run(out, policies, observe=observe)
        run_stage(policies / "v1", preference_table(120), EASY, settings, given, stop_table=stop)

    steps: list[int] = []

    def killed_at(limit: int) -> object:
        def observe(done: int, total: int) -> None:
            steps.append(done)
            if done == limit:
                raise Killed

        return observe

    for limit in (3, 13):
        with pytest.raises(Killed):
            run(tmp_path / "killed", killed_at(limit))
    run(tmp_path / "killed", killed_at(-1))
    # From the start (step 3 left no checkpoint), then from step 10, twice.
    assert steps == [*range(1, 4), *range(1, 14), *range(11, 25)]
    if patience:
        run(tmp_path / "whole")
    whole = tmp_path / "whole" if patience else chain / "easy"
    weights = "policy/adapter/adapter_model.safetensors"
    for name in (METRICS, weights):
        assert (tmp_path / "killed" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "killed" / "checkpoint").exists()


def test_a_checkpoint_of_another_stage_is_not_continued(policies: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        raise Killed

    often = SETTINGS.model_copy(update={"checkpoint_every": 1})
    other = FEW.model_copy(update={"beta": 0.5})
    with pytest.raises(Killed):
        run_stage(
            policies / "v1", preference_table(60), other, often, a_run(tmp_path, policies, observe=kill)
        )
    result = run_stage(policies / "v1", preference_table(60), FEW, often, a_run(tmp_path, policies))
    assert [row["step"] for row in metrics_of(tmp_path)] == list(range(1, result.steps + 1)) == [1, 2, 3, 4]


def test_the_trajectory_of_a_pinned_run_is_the_one_on_file(chain: Path) -> None:
    """What any change of the arithmetic would move: losses, gradient norms and rewards of 24 steps.

    Written by ``json.dumps(metrics_of(chain / "easy"))``. Other CPUs round other sums, and 24 steps of AdamW
    carry that on: a relative 1e-3 is a tenth of what one sample more or less in a batch makes.
    """
    pinned = json.loads(TRAJECTORY.read_text())
    found = metrics_of(chain / "easy")
    assert len(found) == len(pinned) == 24
    for mine, wanted in zip(found, pinned, strict=True):
        assert mine == pytest.approx(wanted, rel=1e-3, abs=2e-3)


@pytest.mark.slow
def test_two_processes_train_the_same_stage_as_one(chain: Path, policies: Path, tmp_path: Path) -> None:
    """Started by ``accelerate launch``: the batch is shared, gradients are added up."""
    script = tmp_path / "stage.py"
    script.write_text(
        "import sys, torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[2])!r}]\n"
        "from tests.trainer.test_stage import *\nfrom trainer.ranks import join_ranks\n"
        "policies, out = map(Path, sys.argv[1:])\n"
        "run = a_run(out, policies, ranks=join_ranks('cpu'))\n"
        "run_stage(policies / 'v1', preference_table(120), EASY, SETTINGS, run)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*launch, str(script), str(policies), str(out)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for ours, theirs in zip(metrics_of(out), metrics_of(chain / "easy"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
        assert ours["rewards/accuracies"] == pytest.approx(theirs["rewards/accuracies"], abs=0.02)
