"""Backbones that come as a directory: what serves, what is refused, and that one line says why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.codec import ScidCodec
from policies.prompt import PAD, PromptTokens
from tests.trainer import small_world
from tests.trainer.backbone_directories import write_backbone
from tests.trainer.small_sft import QUICK
from trainer.errors import CannotTrain
from trainer.settings import LoraSettings
from trainer.sft.backbones import INDEX, from_directory, require_causal
from trainer.sft.base_policy import train_sft
from trainer.sft.lora import with_lora
from trainer.sft.presets import open_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in several files; copy it to change it."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "model", shards=True)


def refusal(directory: Path, codec: ScidCodec) -> str:
    with pytest.raises(CannotTrain) as raised:
        from_directory(directory, codec, seed=0)
    text = str(raised.value)
    assert "\n" not in text
    assert str(directory) in text
    return text


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_a_directory_keeps_its_weights_and_gains_rows(style: str, codec: ScidCodec, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    local = write_backbone(tmp_path / "model", style=style, tied=False)
    before = AutoModelForCausalLM.from_pretrained(local)
    found = from_directory(local, codec, seed=0)
    rows = before.get_input_embeddings().weight.shape[0]
    tokens = PromptTokens(found.tokenizer, codec)
    assert len(tokens.ids) == 25
    assert min(tokens.ids) >= rows
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(found.model, get)().weight
        torch.testing.assert_close(new[:rows], old, atol=0, rtol=0)
        torch.testing.assert_close(new[rows:], old.mean(dim=0).expand(len(new) - rows, -1), atol=1e-3, rtol=0)
        assert len(new[tokens.ids].unique(dim=0)) == 25


def test_a_backbone_without_a_pad_token_gets_one(codec: ScidCodec, codec_dir: Path, tmp_path: Path) -> None:
    local = write_backbone(tmp_path / "model", pad=False)
    found = from_directory(local, codec, seed=0)
    assert found.tokenizer.pad_token == PAD
    assert found.tokenizer.pad_token_id < found.model.get_input_embeddings().weight.shape[0]
    wanted = QUICK.model_copy(update={"backbone": str(local), "steps": 1})
    assert train_sft(codec_dir, small_world.histories(6), wanted, tmp_path / "policy").steps == 1


def test_rows_that_a_vocabulary_has_to_spare_are_started_too(codec: ScidCodec, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = write_backbone(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(local)
    known = len(AutoTokenizer.from_pretrained(local))
    model.resize_token_embeddings(known + 40)
    model.get_input_embeddings().weight.data[known:] = 100.0
    model.save_pretrained(local)
    found = from_directory(local, codec, seed=0)
    rows = found.model.get_input_embeddings().weight
    assert len(rows) == known + 40
    assert rows[PromptTokens(found.tokenizer, codec).ids].abs().max() < 1


def test_tokens_that_a_backbone_knows_already_keep_their_rows(codec: ScidCodec, tmp_path: Path) -> None:
    once = from_directory(write_backbone(tmp_path / "model"), codec, seed=0)
    once.model.get_input_embeddings().weight.data[-5:] = 0.5
    once.model.save_pretrained(tmp_path / "again")
    once.tokenizer.save_pretrained(tmp_path / "again")
    twice = from_directory(tmp_path / "again", codec, seed=1)
    torch.testing.assert_close(
        twice.model.get_input_embeddings().weight, once.model.get_input_embeddings().weight
    )


# What is refused


def lose_a_shard(directory: Path) -> str:
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    return rf"interrupted download.*{shard.name}"


def leave_a_part(directory: Path) -> str:
    (directory / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "download" / "abc.incomplete").touch()
    return "interrupted download.*abc.incomplete"


def cut_a_shard(directory: Path) -> str:
    shard = max(directory.glob("model-*.safetensors"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    return f"{shard.name} is no whole safetensors file"


def leave_a_placeholder(directory: Path) -> str:
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "placeholder"


def lose_the_index(directory: Path) -> str:
    (directory / INDEX).unlink()
    return f"interrupted download.*{INDEX}"


def break_the_index(directory: Path) -> str:
    (directory / INDEX).write_text("{")
    return f"{INDEX} cannot be read"


def drop_weights_from_the_index(directory: Path) -> str:
    facts = json.loads((directory / INDEX).read_text())
    facts["weight_map"] = dict(list(facts["weight_map"].items())[:3])
    (directory / INDEX).write_text(json.dumps(facts))
    return "lacks .* weights of a LlamaForCausalLM"


def lose_the_config(directory: Path) -> str:
    (directory / "config.json").unlink()
    return "no config.json"


def break_the_config(directory: Path) -> str:
    (directory / "config.json").write_text("{")
    return "cannot be loaded"


def lose_the_tokenizer(directory: Path) -> str:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    return "no tokenizer"


def pickle_the_weights(directory: Path) -> str:
    for file in directory.glob("model*"):
        file.unlink()
    torch.save({}, directory / "pytorch_model.bin")
    return "pytorch_model.bin.* are pickles"


def ask_for_remote_code(directory: Path) -> str:
    file = directory / "config.json"
    facts = json.loads(file.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    file.write_text(json.dumps(facts))
    (directory / "own.py").write_text("raise SystemExit('this code must not run')")
    return "cannot be loaded"


@pytest.mark.parametrize(
    "spoil",
    [
        lose_a_shard, leave_a_part, cut_a_shard, leave_a_placeholder, lose_the_index, break_the_index,
        drop_weights_from_the_index, lose_the_config, break_the_config, lose_the_tokenizer,
        pickle_the_weights, ask_for_remote_code,
    ],
)  # fmt: skip
def test_a_directory_that_is_not_whole_is_refused_in_one_line(
    spoil: Callable[[Path], str], whole: Path, codec: ScidCodec, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(whole, directory)
    expected = spoil(directory)
    with pytest.raises(CannotTrain, match=expected):
        from_directory(directory, codec, seed=0)
    refusal(directory, codec)


def save_other(model: Any, whole: Path, directory: Path) -> Path:
    for file in whole.glob("tokenizer*"):
        directory.mkdir(exist_ok=True)
        shutil.copy(file, directory)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("head", [True, False])
def test_an_encoder_is_refused(head: bool, whole: Path, codec: ScidCodec, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    encoder = (BertForMaskedLM if head else BertModel)(config)
    text = refusal(save_other(encoder, whole, tmp_path / "bert"), codec)
    assert ("reads ahead" if head else "no causal language model") in text


def test_a_translator_is_refused(whole: Path, codec: ScidCodec, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    assert "cannot be loaded" in refusal(save_other(model, whole, tmp_path / "t5"), codec)


def test_a_recurrent_model_is_refused(whole: Path, codec: ScidCodec, tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2)
    )
    assert "cannot be loaded" in refusal(save_other(model, whole, tmp_path / "mamba"), codec)


def test_attention_that_reads_tree_masks_wrongly_is_refused(whole: Path, codec: ScidCodec) -> None:
    model = from_directory(whole, codec, seed=0).model
    require_causal(model, whole)
    model.set_attn_implementation("eager")
    with pytest.raises(CannotTrain, match="cannot read packed prompts"):
        require_causal(model, whole)


# Quantization


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantization_without_a_gpu_is_refused(quantization: str, whole: Path, codec: ScidCodec) -> None:
    with pytest.raises(CannotTrain, match="needs a CUDA GPU, not cpu"):
        from_directory(whole, codec, seed=0, quantization=quantization)
    with pytest.raises(CannotTrain, match="preset demo is trained from scratch"):
        open_backbone("demo", codec, [], text_vocabulary=260, seed=0, quantization=quantization)


def test_quantization_without_its_library_is_refused(
    whole: Path, codec: ScidCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(CannotTrain, match="pip install 'align3gr\\[quantized\\]'"):
        from_directory(whole, codec, seed=0, quantization="4bit", device="cuda:0")


def test_quantized_weights_are_trained_by_lora_alone(whole: Path, codec: ScidCodec) -> None:
    found = from_directory(whole, codec, seed=0)
    found.model.is_quantized = True
    with pytest.raises(CannotTrain, match=r"lora\.rank"):
        with_lora(found, LoraSettings(rank=0), [], seed=0)
