"""Every file of settings/: it loads, says what the paper says, and its recipe runs on a tiny model.

The tiny model is of the architecture that the file names; of the recipe only sizes are made smaller.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from align3gr.settings import Settings, load_settings
from policies.codec import ScidCodec
from policies.policy import Policy, UserContext
from tests.trainer import small_world
from trainer.errors import CannotTrain
from trainer.preference.stage import StageRun, run_stage
from trainer.sft.base_policy import train_sft
from trainer.sft.presets import PRESETS, byte_level_tokenizer
from trainer.sft.tasks import CatalogueText
from trainer.tokenization import fit_codec

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).resolve().parents[2] / "settings"
FILES = sorted(FOLDER.glob("*.yaml"))
HISTORIES = small_world.histories(40)


def test_the_papers_file_says_what_the_paper_says() -> None:
    settings = load_settings(FOLDER / "paper.yaml")
    tokenization, sft, preference = (
        settings.trainer.tokenization, settings.trainer.sft, settings.trainer.preference,
    )  # fmt: skip
    assert (tokenization.levels, tokenization.codes, tokenization.code_dimension) == (3, 256, 32)
    assert tokenization.users
    assert "Llama-2-7b" in sft.backbone
    assert (sft.samples_per_step, sft.steps) == (1024, 20_000)
    assert sft.learning_rate in {1e-3, 5e-4, 1e-4}
    assert (sft.lora.rank, sft.lora.alpha, sft.lora.dropout) == (8, 16, 0.05)
    assert sft.lora.targets == "all-linear"
    assert (preference.max_rejected, settings.policies.decoding.beam) == (20, 20)
    assert [(stage.name, stage.data, stage.beta) for stage in preference.stages] == [
        ("easy", "easy", 1.0), ("hard", "hard", 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_recipe_of_a_file_runs_on_a_tiny_model_of_its_architecture(file: Path, tmp_path: Path) -> None:
    settings = load_settings(file)
    trainer = settings.trainer
    small: dict[str, Any] = {
        "text_encoder": None,
        "codes": 8,
        "code_dimension": 8,
        "hidden": (32,),
        "steps": 30,
    }
    small |= {"text_dimension": 12, "users": file.stem == "paper"}  # the slow part, once
    small["collaborative"] = trainer.tokenization.collaborative.model_copy(update={"epochs": 2})
    small["alignment"] = trainer.tokenization.alignment.model_copy(update={"epochs": 2, "min_pairs": 32})
    codec = tmp_path / "codec"
    fit_codec(small_world.items(), HISTORIES, trainer.tokenization.model_copy(update=small), codec)
    assert bool(ScidCodec.load(codec).user_sizes) == small["users"]
    backbone = trainer.sft.backbone
    if backbone not in PRESETS:
        backbone = str(write_tiny("qwen" if "qwen" in file.stem else "llama", tmp_path / "model"))
    changes: dict[str, Any] = {"backbone": backbone, "steps": 2, "precision": "float32"}
    changes["samples_per_step"] = 64
    changes["sasrec"] = trainer.sft.sasrec.model_copy(update={"epochs": 1})
    sft = trainer.sft.model_copy(update=changes)
    if sft.quantization != "none":
        with pytest.raises(CannotTrain, match="needs a CUDA GPU"):
            train_sft(codec, HISTORIES, sft, tmp_path / "v1")
        sft = sft.model_copy(update={"quantization": "none"})
    catalogue = CatalogueText.of(small_world.items())
    report = train_sft(codec, HISTORIES, sft, tmp_path / "v1", version="v1", catalogue=catalogue)
    assert len(report.tasks) == (9 if file.stem == "paper" else 0)
    assert (report.steps, report.backbone) == (2, backbone)
    assert (report.trained_parameters < report.parameters) == (backbone not in PRESETS)
    assert lists(tmp_path / "v1", settings) == 10

    stage = trainer.preference.stages[0].model_copy(update={"epochs": 1, "min_samples": 8})
    preference = trainer.preference.model_copy(update={"batch_size": 8})
    run = StageRun(out_dir=tmp_path / "easy", version="v2", seed=0, policies=tmp_path)
    result = run_stage(tmp_path / "v1", preferences(16), stage, preference, run)
    assert result.steps == 2
    assert lists(result.policy, settings, policies=tmp_path) == 10


def test_the_files_are_the_ones_that_docs_name() -> None:
    assert [file.name for file in FILES] == [
        "distilled.yaml", "llama2-7b.yaml", "paper.yaml", "plain.yaml", "qwen.yaml",
    ]  # fmt: skip
    page = (FOLDER.parent / "docs" / "base-policy.md").read_text()
    assert all(f"settings/{file.name}" in page for file in FILES)


def lists(directory: Path, settings: Settings, **where: Any) -> int:
    """Items that the policy recommends to one user, searched as the file says."""
    policy = Policy.load(directory, settings=settings.policies.decoding, **where)
    (found,) = policy.recommend([UserContext("u", tuple(HISTORIES[0]))], 10)
    return len({one.item_id for one in found})


def preferences(count: int) -> pa.Table:
    """Samples with 20 rejected items."""
    random = np.random.default_rng(0)
    names = small_world.items().column("item_id").to_pylist()
    rows = []
    for number in range(count):
        drawn = random.permutation(names).tolist()
        rows.append(
            {
                "sample_id": f"s{number}", "user_id": f"u{number}", "history": drawn[:5],
                "chosen": drawn[5], "rejected": drawn[6:26],
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def write_tiny(architecture: str, directory: Path) -> Path:
    """Llama-2's shape (untied head, no pad token) or Qwen3's (tied, grouped keys, normed heads), small."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = byte_level_tokenizer(["a red lamp"], 270)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if architecture == "llama":
        tokenizer.pad_token = None
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    else:
        model = Qwen3ForCausalLM(
            Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
