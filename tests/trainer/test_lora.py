"""LoRA in SFT: what is trained, that merging changes no logit, that resuming changes no weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec
from policies.policy import Policy
from policies.prompt import PromptTokens
from tests.policies.factory import tiny_model, tiny_tokenizer
from tests.trainer import small_world
from tests.trainer.backbone_directories import write_backbone
from tests.trainer.small_sft import QUICK, model_for, rows_of
from trainer.errors import CannotTrain
from trainer.settings import LoraSettings, TaskSettings
from trainer.sft.backbones import Backbone
from trainer.sft.base_policy import token_map, train_sft
from trainer.sft.data import windows_of
from trainer.sft.lora import LARGE, onto, plain, rank_for, trained_state, with_lora
from trainer.sft.presets import open_backbone
from trainer.sft.tasks import CatalogueText
from trainer.sft.training import train_next_item

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = LoraSettings(rank=4, alpha=8)


def backbone_of(model: Any, codec: ScidCodec) -> Backbone:
    return Backbone(model, tiny_tokenizer(codec), 1e-2, "tiny")


def learner(codec: ScidCodec, tokens: PromptTokens, *, tied: bool = True, style: str = "llama") -> Any:
    model = tiny_model(len(tiny_tokenizer(codec)), style=style, tied=tied).train()
    return with_lora(backbone_of(model, codec), LORA, tokens.ids, seed=0)


def train(model: Any, codec: ScidCodec, tokens: PromptTokens, **changes: Any) -> Any:
    where = {name: changes.pop(name) for name in ("checkpoint", "progress") if name in changes}
    wanted = QUICK.model_copy(update={"lora": LORA, "epochs": 2, **changes})
    windows = windows_of(rows_of(codec, [5, 8, 3, 12, 30, 7] * 4))
    return train_next_item(
        model, windows, token_map(tokens), wanted, learning_rate=1e-2, run_key="k", **where
    )


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 43)[None]).logits
    return found


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_before_the_first_step_nothing_has_changed(
    tied: bool, style: str, codec: ScidCodec, tokens: PromptTokens
) -> None:
    before = logits_of(tiny_model(len(tiny_tokenizer(codec)), style=style, tied=tied))
    torch.testing.assert_close(logits_of(learner(codec, tokens, tied=tied, style=style)), before)


@pytest.mark.parametrize("tied", [True, False])
def test_merging_what_was_learned_changes_no_logit(
    tied: bool, codec: ScidCodec, tokens: PromptTokens
) -> None:
    model = learner(codec, tokens, tied=tied)
    start = logits_of(model)
    facts = train(model, codec, tokens)
    assert facts.losses[-1] < facts.losses[0]
    # In float64: such random weights turn float32's rounding into 2e-5 of these logits.
    learned = logits_of(model.double())
    assert (learned - start).abs().max() > 0.1
    fresh = tiny_model(len(tiny_tokenizer(codec)), tied=tied).double()
    # What a quantized model goes through: its LoRA on the backbone in full precision.
    torch.testing.assert_close(logits_of(onto(fresh, model)), learned, atol=1e-9, rtol=0)
    merged = plain(model, lambda: pytest.fail("only a quantized model is opened again"))
    torch.testing.assert_close(logits_of(merged), learned, atol=1e-9, rtol=0)
    assert not hasattr(merged, "peft_config")
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert all(weight.requires_grad for weight in merged.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_of_embedding_and_head_just_the_codecs_rows_are_trained(
    tied: bool, codec: ScidCodec, tokens: PromptTokens
) -> None:
    before = tiny_model(len(tiny_tokenizer(codec)), tied=tied)
    model = learner(codec, tokens, tied=tied)
    train(model, codec, tokens)
    merged = plain(model, model)
    ours = torch.zeros(before.get_input_embeddings().weight.shape[0], dtype=torch.bool)
    ours[tokens.ids] = True
    for get in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(merged, get)().weight != getattr(before, get)().weight).any(dim=1)
        assert not moved[~ours].any()
        assert moved[ours].float().mean() > 0.9
    assert (merged.model.layers[0].mlp.down_proj.weight != before.model.layers[0].mlp.down_proj.weight).any()


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_resumed_lora_training_ends_as_an_uninterrupted_one(
    stop_after: int, codec: ScidCodec, tokens: PromptTokens, tmp_path: Path
) -> None:
    def progress(step: Any) -> None:
        if step.step == stop_after:
            raise KeyboardInterrupt

    straight = learner(codec, tokens)
    facts = train(straight, codec, tokens)
    where = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(learner(codec, tokens), codec, tokens, progress=progress, **where)
    resumed = learner(codec, tokens)
    again = train(resumed, codec, tokens, **where)
    assert again.losses == facts.losses
    assert again.resumed_at == (stop_after - 1) // 2 * 2
    for name, weight in trained_state(straight).items():
        torch.testing.assert_close(weight, trained_state(resumed)[name], atol=0, rtol=0)


def test_a_checkpoint_holds_what_is_trained_alone(codec: ScidCodec, tokens: PromptTokens) -> None:
    names = list(trained_state(learner(codec, tokens, tied=False)))
    assert {name.rsplit(".", 2)[1] if "lora" not in name else "lora" for name in names} == {
        "lora", "trainable_tokens_delta",
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing_changes_no_weight(
    lora: bool, precision: str, codec: ScidCodec, tokens: PromptTokens
) -> None:
    ended = []
    for checkpointing in (False, True):
        model = learner(codec, tokens) if lora else model_for(codec)
        wanted = {"gradient_checkpointing": checkpointing, "precision": precision, "steps": 2}
        train(model, codec, tokens, **wanted)
        ended.append(trained_state(model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for name, weight in ended[0].items():
        torch.testing.assert_close(weight, ended[1][name], atol=0, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_take_the_place_of_epochs(steps: int, codec: ScidCodec, tokens: PromptTokens) -> None:
    rates: list[float] = []
    done = train(
        model_for(codec), codec, tokens, steps=steps, progress=lambda step: rates.append(step.learning_rate)
    )
    assert done.steps == steps == len(rates)
    assert rates[0] == max(rates)


def test_lora_is_for_large_pretrained_models_unless_settings_say_otherwise(codec: ScidCodec) -> None:
    model = torch.nn.Linear(1, 1)
    large = torch.nn.Module()
    large.weight = torch.nn.Parameter(torch.empty(LARGE, device="meta"))
    auto = LoraSettings()
    assert rank_for(Backbone(model, None, 1.0, "small"), auto) == 0
    assert rank_for(Backbone(large, None, 1.0, "large"), auto) == 8
    assert rank_for(Backbone(large, None, 1.0, "preset", scratch=True), auto) == 0
    assert rank_for(Backbone(large, None, 1.0, "large"), LoraSettings(rank=0)) == 0
    assert rank_for(Backbone(model, None, 1.0, "small"), LoraSettings(rank=3)) == 3


@pytest.mark.parametrize(("tied", "own"), [(True, 0), (True, 20), (False, 20)])
def test_a_policy_trained_by_lora_is_a_full_one(
    tied: bool, own: int, codec_dir: Path, tmp_path: Path
) -> None:
    local = write_backbone(tmp_path / "model", tied=tied)
    changes = {"backbone": str(local), "lora": LORA, "steps": 2, "item_tokens": own}
    changes |= {"tasks": TaskSettings(item_to_text=1.0), "gradient_checkpointing": own > 0}
    wanted = QUICK.model_copy(update=changes)
    catalogue = CatalogueText.of(small_world.items())
    histories = small_world.histories(12)
    report = train_sft(codec_dir, histories, wanted, tmp_path / "policy", catalogue=catalogue)
    assert list(report.tasks) == ["item_to_text"]
    assert report.trained_parameters < report.parameters / 2
    policy = Policy.load(tmp_path / "policy")
    assert policy.manifest.kind == "full"
    assert policy.manifest.lineage["settings"]["sft"]["lora"]["rank"] == 4
    rows = np.flatnonzero(policy.tokens.own >= 0).tolist()
    assert len(rows) == own
    unchanged = open_backbone(str(local), policy.codec, [], text_vocabulary=None, seed=0, items=rows).model
    mine, theirs = policy.model.get_input_embeddings().weight, unchanged.get_input_embeddings().weight
    others = [row for row in range(len(mine)) if row not in policy.tokens.ids]
    torch.testing.assert_close(mine[others], theirs[others], atol=0, rtol=0)


def test_targets_that_match_nothing_are_refused(codec: ScidCodec, tokens: PromptTokens) -> None:
    wrong = LoraSettings(rank=4, targets=("no_such_proj",))
    with pytest.raises(CannotTrain, match="no_such_proj"):
        with_lora(backbone_of(model_for(codec), codec), wrong, tokens.ids, seed=0)


def test_a_head_with_a_bias_is_refused_for_lora(codec: ScidCodec, tokens: PromptTokens) -> None:
    model = model_for(codec)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    with pytest.raises(CannotTrain, match="bias"):
        with_lora(backbone_of(model, codec), LORA, tokens.ids, seed=0)
