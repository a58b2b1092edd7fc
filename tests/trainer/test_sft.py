"""SFT: packed rows equal separate prompts, split steps whole ones, a resumed run an uninterrupted one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

from policies.codec import ScidCodec
from policies.policy import Policy, UserContext
from policies.prompt import PromptTokens, answer_ids, prompt_ids
from policies.scoring import pack, token_log_probs
from tests.policies.factory import item_ids, tiny_codec, tiny_model
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, model_for, rows_of
from trainer.errors import CannotTrain
from trainer.ranks import Ranks
from trainer.settings import TokenizationSettings
from trainer.sft.base_policy import index_histories, token_map, train_sft
from trainer.sft.data import TokenMap, batches_of, branches_of, tree_batch, windows_of
from trainer.sft.presets import byte_level_tokenizer, open_backbone
from trainer.sft.training import accumulate, sample_logits, schedule, train_next_item
from trainer.tokenization import fit_codec

pytestmark = pytest.mark.usefixtures("one_thread")


# Windows and batches


@hypothesis_settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 70), limit=st.integers(1, 20))
def test_every_item_but_the_first_is_a_target_once(length: int, limit: int) -> None:
    history = np.arange(length)
    windows = windows_of([history], max_history=limit)
    targets = [item for window in windows for item in window.items[window.first :].tolist()]
    assert targets == list(range(1, length))
    for window in windows:
        assert len(window.items) <= limit + 1
        assert window.items[0] == window.start
        # A target sees all that came before it, or at least half of what a prompt holds.
        assert window.start == 0 or window.first >= max(limit // 2, 1)


def test_batches_hold_every_window_once_and_depend_on_seed_and_epoch_only(codec: ScidCodec) -> None:
    windows = windows_of(rows_of(codec, [3, 30, 8, 2, 5, 21, 22, 4] * 20))
    batches = batches_of(windows, targets=64, seed=1, epoch=0)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(windows)))
    again = batches_of(windows, targets=64, seed=1, epoch=0)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
    other = batches_of(windows, targets=64, seed=1, epoch=1)
    assert [b.tolist() for b in batches] != [b.tolist() for b in other]
    samples = [sum(len(windows[i].items) - windows[i].first for i in batch) for batch in batches]
    assert max(samples) <= 64 + 20


def test_a_batch_is_laid_out_as_documented() -> None:
    tokens = TokenMap(np.array([[10, 20], [11, 21], [12, 22]]), begin=(1,), recommend=9, pad=0)
    windows = windows_of([np.array([0, 1, 2]), np.array([2, 0])])
    batch = tree_batch(branches_of(windows), tokens)
    # BOS, two items (or one and padding), then <recommend> and the first code of each target.
    assert batch.input_ids.tolist() == [[1, 10, 20, 11, 21, 9, 11, 9, 12], [1, 12, 22, 0, 0, 9, 10, 9, 12]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert batch.targets.tolist() == [[11, 21], [12, 22], [10, 20]]
    assert batch.scored.tolist() == [[5, 6], [7, 8], [14, 15]]
    # The second target's code sees BOS, both items, its own <recommend> and itself.
    assert batch.allowed[0, 8].tolist() == [True] * 5 + [False, False, True, True]
    assert batch.allowed[0, 5].tolist() == [True] * 3 + [False, False, True, False, False, False]


# The packed row against separate prompts


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_packed_rows_give_the_loss_and_gradients_of_separate_prompts(
    style: str, codec: ScidCodec, tokens: PromptTokens
) -> None:
    histories = rows_of(codec, [6, 2, 9, 4])
    windows = windows_of(histories)
    model = model_for(codec, style).double()
    logits = sample_logits(model, tree_batch(branches_of(windows), token_map(tokens)))
    targets = tree_batch(branches_of(windows), token_map(tokens)).targets
    packed = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(-1, 3)
    packed.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    names = codec.item_ids
    prompts, answers = [], []
    for history in histories:
        for place in range(1, len(history)):
            prompts.append(prompt_ids(tokens, [names[i] for i in history[:place]]))
            answers.append([answer_ids(tokens, names[history[place]])])
    separate = token_log_probs(model, pack(prompts, answers, tokens.pad))[:, 0]
    # float64, but scoring's normaliser is float32: its rounding is the tolerance.
    torch.testing.assert_close(packed.detach(), separate.double().detach(), atol=2e-6, rtol=0)
    separate.sum().backward()
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-5)


def test_a_dropped_item_is_out_of_the_history_and_stays_a_target(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    history = rows_of(codec, [9])[0]
    branches = branches_of(windows_of([history]), drop=0.5, rng=np.random.default_rng(0))
    kept = branches.prefix[0][branches.prefix[0] >= 0].tolist()
    assert 0 < len(kept) < 8
    assert branches.answers[0].tolist() == history[1:].tolist()
    for place, visible in enumerate(branches.visible[0].tolist(), start=1):
        assert kept[:visible] == [item for item in history[:place].tolist() if item in kept]

    model = model_for(codec)
    with torch.no_grad():
        packed = sample_logits(model, tree_batch(branches, token_map(tokens)))
        prompt = prompt_ids(tokens, [codec.item_ids[i] for i in kept[: branches.visible[0, -1]]])
        alone = model(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(packed[-1, 0], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("micro", [1, 7, 1000])
def test_a_split_step_has_the_gradient_of_the_whole(
    micro: int, codec: ScidCodec, tokens: PromptTokens
) -> None:
    windows = windows_of(rows_of(codec, [6, 2, 9, 4, 25]))
    results = []
    for micro_samples in (None, micro):
        model = model_for(codec).double()
        wanted = QUICK.model_copy(update={"micro_samples": micro_samples, "drop_items": 0.3})
        loss, _ = accumulate(model, windows, token_map(tokens), wanted, np.random.default_rng(0), "cpu", None)
        results.append((loss, [p.grad for p in model.parameters()]))
    # The loss is taken in float32.
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_the_processes_of_a_step_add_up_to_its_gradient(
    count: int, codec: ScidCodec, tokens: PromptTokens
) -> None:
    windows = windows_of(rows_of(codec, [6, 2, 9, 4, 25]))
    wanted = QUICK.model_copy(update={"drop_items": 0.3})
    whole, shared = model_for(codec).double(), model_for(codec).double()
    alone = accumulate(whole, windows, token_map(tokens), wanted, np.random.default_rng(0), "cpu", None)
    parts = [
        accumulate(
            shared, windows, token_map(tokens), wanted, np.random.default_rng(0), "cpu", None,
            ranks=Ranks(index, count),
        )
        for index in range(count)
    ]  # fmt: skip
    assert sum(loss for loss, _ in parts) == pytest.approx(alone[0], abs=1e-5)
    for one, other in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


# Training


def trained(
    codec: ScidCodec, tokens: PromptTokens, checkpoint: Path | None = None, stop_after: int | None = None
) -> tuple[Any, Any]:
    windows = windows_of(rows_of(codec, [5, 8, 3, 12, 30, 7] * 8))
    model = model_for(codec)
    wanted = QUICK.model_copy(update={"checkpoint_every": 2, "epochs": 3})

    def progress(step: Any) -> None:
        if step.step == stop_after:
            raise KeyboardInterrupt

    return model, train_next_item(
        model, windows, token_map(tokens), wanted,
        learning_rate=1e-2, checkpoint=checkpoint, run_key="k", progress=progress,
    )  # fmt: skip


@pytest.mark.parametrize("stop_after", [1, 5, 8])
def test_a_resumed_training_ends_as_an_uninterrupted_one(
    stop_after: int, codec: ScidCodec, tokens: PromptTokens, tmp_path: Path
) -> None:
    straight, facts = trained(codec, tokens)
    with pytest.raises(KeyboardInterrupt):
        trained(codec, tokens, tmp_path / "state", stop_after)
    resumed, again = trained(codec, tokens, tmp_path / "state")
    assert again.resumed_at == (stop_after - 1) // 2 * 2
    assert again.losses == facts.losses
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_trajectory_of_a_tiny_run_is_pinned(codec: ScidCodec, tokens: PromptTokens) -> None:
    _, facts = trained(codec, tokens)
    # Measured once; the tolerance leaves room for another CPU's rounding, not for another recipe.
    assert facts.losses == pytest.approx(PINNED, abs=2e-3)
    assert facts.losses[-1] < facts.losses[0]


PINNED = [5.1686, 2.4852, 2.0779]


def test_a_checkpoint_of_another_run_is_not_continued(
    codec: ScidCodec, tokens: PromptTokens, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(codec, tokens, tmp_path / "state", 5)
    windows = windows_of(rows_of(codec, [5, 8]))
    done = train_next_item(
        model_for(codec), windows, token_map(tokens), QUICK,
        learning_rate=1e-2, checkpoint=tmp_path / "state", run_key="another",
    )  # fmt: skip
    assert done.resumed_at == 0


def test_bfloat16_follows_float32_closely(codec: ScidCodec, tokens: PromptTokens) -> None:
    windows = windows_of(rows_of(codec, [6, 2, 9, 4, 25]))
    losses = [
        accumulate(
            model_for(codec), windows, token_map(tokens), QUICK, np.random.default_rng(0), "cpu", cast
        )[0]
        for cast in (None, torch.bfloat16)
    ]
    # Eight bits of mantissa: about 0.4% of a value.
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


# The base policy


def test_the_base_policy_beats_popularity(codec_dir: Path, tmp_path: Path) -> None:
    from trainer.cases import leave_one_out
    from trainer.evaluation import popularity_baseline, rank_catalogue

    histories = {f"u{n}": history for n, history in enumerate(small_world.histories(120))}
    split = list(leave_one_out(histories))
    training = [before for _, before in split]
    wanted = QUICK.model_copy(update={"epochs": 8, "samples_per_step": 32})
    report = train_sft(codec_dir, training, wanted, tmp_path / "one", texts=["lamp and chair"])
    assert report.samples == sum(len(before) - 1 for before in training)
    assert report.losses[-1] < report.losses[0]
    policy = Policy.load(tmp_path / "one")
    assert policy.manifest.kind == "full"
    assert policy.manifest.lineage["settings"]["sft"]["epochs"] == 8

    cases = [case for case, _ in split]
    found = rank_catalogue(policy, cases, cutoffs=(5,)).means["recall@5"]
    popular = [one.item_id for one in policy.recommend([UserContext("nobody")], 60)[0]]
    # 60 items in 6 topics: knowing the topic alone finds the target among 5 of at most 9 left.
    assert found > 2 * popularity_baseline(popular, cases, cutoffs=(5,))["recall@5"]


def test_the_same_input_gives_the_same_policy(codec_dir: Path, tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        train_sft(codec_dir, small_world.histories(24), QUICK, tmp_path / name, texts=["lamp and chair"])
        models.append(Policy.load(tmp_path / name).model)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


def test_three_items_and_one_user_are_enough(tmp_path: Path) -> None:
    wanted = TokenizationSettings(users=False, hidden=(8,), code_dimension=4, steps=20)
    histories = [["item-000", "item-001", "item-002"]]
    fit_codec(small_world.items(3), histories, wanted, tmp_path / "codec")
    report = train_sft(tmp_path / "codec", histories, QUICK, tmp_path / "policy")
    assert report.samples == 2
    listed = Policy.load(tmp_path / "policy").recommend([UserContext("u", ("item-000",))], 10)[0]
    assert sorted(one.item_id for one in listed) == item_ids(3)


def test_nothing_to_learn_from_is_refused(codec_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="two items"):
        train_sft(codec_dir, [["item-000"], ["unknown", "item-001"]], QUICK, tmp_path / "policy")
    unknown = QUICK.model_copy(update={"backbone": "no-such-model"})
    with pytest.raises(CannotTrain, match="no-such-model"):
        train_sft(codec_dir, small_world.histories(3), unknown, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_a_local_model_directory_gets_the_scid_tokens(
    codec: ScidCodec, codec_dir: Path, tmp_path: Path
) -> None:
    plain = byte_level_tokenizer(["a lamp"], 260)
    local = tmp_path / "model"
    tiny_model(len(plain), style="qwen").save_pretrained(local)
    plain.save_pretrained(local)
    found = open_backbone(str(local), codec, [], text_vocabulary=None, seed=0)
    rows = found.model.get_input_embeddings().weight.shape[0]
    assert rows == len(found.tokenizer) >= len(plain) + 24 + 1
    wanted = QUICK.model_copy(update={"backbone": str(local), "epochs": 1})
    train_sft(codec_dir, small_world.histories(12), wanted, tmp_path / "policy")
    policy = Policy.load(tmp_path / "policy")
    assert type(policy.model).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize("text", ["lamp <a_1> chair", "naïve 漢字 🎈", "<recommend>"])
def test_a_presets_tokenizer_reads_any_text_and_never_an_scid_in_it(text: str, codec: ScidCodec) -> None:
    from policies.prompt import text_ids

    tokenizer = open_backbone("demo", codec, ["a red lamp"], text_vocabulary=260, seed=0).tokenizer
    ids = text_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {tokenizer.convert_tokens_to_ids(t) for t in ("<a_1>", "<recommend>")}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("demo", 0.6e6, 1.2e6), ("mini", 1.2e6, 1.7e6), ("tiny", 4e6, 6e6), ("small", 18e6, 23e6)],
)
def test_presets_have_the_sizes_they_state(name: str, least: float, most: float) -> None:
    codec = tiny_codec(60, (256, 256, 256))
    model = open_backbone(name, codec, ["a red lamp"], text_vocabulary=None, seed=0).model
    assert least < sum(p.numel() for p in model.parameters()) < most


def test_histories_of_unknown_items_are_counted(codec: ScidCodec) -> None:
    found = index_histories(codec, [["item-001", "gone", "item-000"]])
    assert found[0].tolist() == [1, 0]
