"""Users' SCIDs through training: each sample has its own, and a packed row is still the separate prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from policies.users import ItemVectors
from tests.policies.factory import (
    item_ids,
    tiny_codec,
    tiny_model,
    tiny_tokenizer,
    tiny_user_codec,
    write_tiny_policy,
)
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, rules_teacher
from tests.trainer.test_stage import EASY, SETTINGS, a_run, preference_table
from trainer.errors import TrainerError
from trainer.newcomers import grow_codec, grown_codec
from trainer.preference.samples import encode_samples
from trainer.preference.stage import run_stage
from trainer.sft.base_policy import index_histories, run_key, token_map, train_sft
from trainer.sft.data import TokenMap, branches_of, tree_batch, windows_of
from trainer.sft.training import accumulate, sample_logits, sample_losses, train_next_item
from trainer.sft.user_scids import UserScids
from trainer.slates import log_probs

LENGTHS = [6, 2, 1, 9, 0, 47, 4, 21]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def codec_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("codec")
    tiny_user_codec(directory, items=60)
    return directory


@pytest.fixture(scope="module")
def codec(codec_dir: Path) -> ScidCodec:
    return ScidCodec.load(codec_dir)


@pytest.fixture(scope="module")
def tokens(codec: ScidCodec) -> PromptTokens:
    return PromptTokens(tiny_tokenizer(codec), codec)


def model_for(codec: ScidCodec, style: str = "llama") -> Any:
    return tiny_model(len(tiny_tokenizer(codec)), style=style)


def rows_of(lengths: list[int], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return [random.permutation(60)[:length].astype(np.int64) for length in lengths]


def scids_of(codec: ScidCodec, histories: list[np.ndarray[Any, Any]]) -> UserScids:
    scids = UserScids.of(codec, histories)
    assert scids is not None
    return scids


@hypothesis_settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_every_sample_has_the_scid_of_the_user_before_its_target(
    codec: ScidCodec, lengths: list[int]
) -> None:
    histories = rows_of(lengths)
    scids = scids_of(codec, histories)
    names = codec.item_ids
    expected = [
        codec.encode_users([[names[i] for i in history[:place]]])[0].tolist()
        for history in histories
        for place in range(1, len(history))
    ]
    assert scids.codes.tolist() == expected


def test_chunks_change_nothing_and_a_codec_without_scids_for_users_has_none(
    codec: ScidCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories = rows_of(LENGTHS)
    whole = scids_of(codec, histories)
    monkeypatch.setattr("trainer.sft.user_scids.CHUNK", 7)
    assert scids_of(codec, histories).codes.tolist() == whole.codes.tolist()
    assert UserScids.of(tiny_codec(60), histories) is None


def test_a_batch_with_users_is_laid_out_as_documented() -> None:
    tokens = TokenMap(
        np.array([[10, 20], [11, 21], [12, 22]]), begin=(1,), recommend=9, pad=0,
        users=(np.array([30, 31]), np.array([40, 41, 42])),
    )  # fmt: skip
    windows = windows_of([np.array([0, 1, 2]), np.array([2, 0])])
    scids = UserScids(np.array([[0, 1], [1, 2], [1, 0]], dtype=np.int32), np.array([0, 2]))
    batch = tree_batch(scids.told(branches_of(windows)), tokens)
    # BOS, two items (or one and padding), then for each target the user, <recommend> and the first code; the
    # last branch is filling and is never scored.
    assert batch.input_ids.tolist() == [
        [1, 10, 20, 11, 21, 30, 41, 9, 11, 31, 42, 9, 12],
        [1, 12, 22, 0, 0, 31, 40, 9, 10, 30, 41, 9, 12],
    ]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6, 7, 8]
    assert batch.targets.tolist() == [[11, 21], [12, 22], [10, 20]]
    assert batch.scored.tolist() == [[7, 8], [11, 12], [20, 21]]
    # The second target's code sees BOS, both items, its own user and <recommend>, and itself.
    assert batch.allowed[0, 12].tolist() == [True] * 5 + [False] * 4 + [True] * 4
    # The first target's <recommend> sees BOS, the first item and the user as of then.
    assert batch.allowed[0, 7].tolist() == [True] * 3 + [False] * 2 + [True] * 3 + [False] * 5


def test_samples_and_tokens_that_disagree_about_users_are_refused(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    histories = rows_of([5, 3])
    branches = branches_of(windows_of(histories))
    with pytest.raises(TrainerError, match="0 codes a user, the prompt has 3"):
        tree_batch(branches, token_map(tokens))
    plain = PromptTokens(tiny_tokenizer(tiny_codec(60)), tiny_codec(60))
    with pytest.raises(TrainerError, match="3 codes a user, the prompt has 0"):
        tree_batch(scids_of(codec, histories).told(branches), token_map(plain))


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_packed_rows_with_users_give_the_loss_and_gradients_of_separate_prompts(
    style: str, codec: ScidCodec, tokens: PromptTokens
) -> None:
    histories = rows_of([6, 2, 9, 4])
    branches = scids_of(codec, histories).told(branches_of(windows_of(histories)))
    batch = tree_batch(branches, token_map(tokens))
    model = model_for(codec, style).double()
    logits = sample_logits(model, batch)
    packed = -F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(-1, 3)
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


def test_a_dropped_item_still_counts_for_the_user(codec: ScidCodec, tokens: PromptTokens) -> None:
    history = rows_of([9])[0]
    scids = scids_of(codec, [history])
    dropped = branches_of(windows_of([history]), drop=0.5, rng=np.random.default_rng(0))
    branches = scids.told(dropped)
    kept = branches.prefix[0][branches.prefix[0] >= 0].tolist()
    assert 0 < len(kept) < 8
    names = codec.item_ids
    body = [t for i in kept[: branches.visible[0, -1]] for t in tokens.answer(names[i])]
    user = tokens.users([history[:8]])[0].tolist()
    model = model_for(codec)
    with torch.no_grad():
        packed = sample_logits(model, tree_batch(branches, token_map(tokens)))
        alone = model(torch.tensor([[*tokens.begin, *body, *user, tokens.recommend]])).logits[0, -1]
    torch.testing.assert_close(packed[-1, 0], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("micro", [1, 7])
def test_a_split_step_with_users_has_the_gradient_of_the_whole(
    micro: int, taught: bool, codec: ScidCodec, tokens: PromptTokens
) -> None:
    histories = rows_of(LENGTHS)
    teacher = rules_teacher(histories, len(codec), keep=6, weight=0.5) if taught else None
    results = []
    for micro_samples in (None, micro):
        model = model_for(codec).double()
        wanted = QUICK.model_copy(update={"micro_samples": micro_samples, "drop_items": 0.3})
        loss, _ = accumulate(
            model, windows_of(histories), token_map(tokens), wanted, np.random.default_rng(0), "cpu", None,
            teacher, scids_of(codec, histories),
        )  # fmt: skip
        results.append((loss, [p.grad for p in model.parameters()]))
    # The loss is taken in float32.
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_soft_targets_are_scored_behind_the_prompt_with_the_user(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    """At each level the cross-entropy of the candidates that share the answer's codes so far."""
    histories = rows_of([5, 6, 7, 8, 9] * 6)
    teacher = rules_teacher(histories, len(codec), keep=6, weight=0.7)
    model = model_for(codec)
    branches = scids_of(codec, histories).told(branches_of(windows_of(histories)[:3]))
    branches = teacher.blend(branches, np.random.default_rng(0))
    batch = tree_batch(branches, token_map(tokens))
    with torch.no_grad():
        losses = sample_losses(sample_logits(model, batch), batch).sum(dim=1)
        names, expected = codec.item_ids, []
        for row, history in enumerate(histories[:3]):
            for place in range(1, len(history)):
                answer = int(branches.answers[row, place - 1])
                assert branches.candidates is not None
                assert branches.shares is not None
                candidates = branches.candidates[row, place - 1]
                shares = branches.shares[row, place - 1]
                prompt = prompt_ids(tokens, [names[i] for i in history[:place]])
                wanted = 0.0
                for level in range(3):
                    same = [
                        (int(item), float(share))
                        for item, share in zip(candidates, shares, strict=True)
                        if item >= 0 and (codec.codes[item, :level] == codec.codes[answer, :level]).all()
                    ]
                    options = [[answer_ids(tokens, names[item]) for item, _ in same]]
                    terms = token_log_probs(model, pack([prompt], options, tokens.pad))[0, :, level]
                    weights = torch.tensor([share for _, share in same])
                    wanted -= float((terms * weights).sum() / weights.sum())
                expected.append(wanted)
    # fp32 on losses of order 20.
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_trajectory_of_a_tiny_run_with_users_is_pinned(codec: ScidCodec, tokens: PromptTokens) -> None:
    histories = rows_of([5, 8, 3, 12, 30, 7] * 8)
    facts = train_next_item(
        model_for(codec), windows_of(histories), token_map(tokens), QUICK.model_copy(update={"epochs": 3}),
        learning_rate=1e-2, scids=scids_of(codec, histories),
    )  # fmt: skip
    # Measured once; the tolerance leaves room for another CPU's rounding, not for another recipe.
    assert facts.losses == pytest.approx(PINNED, abs=2e-3)


PINNED = [5.3673, 2.8195, 2.2057]


def test_a_policy_with_users_trains_end_to_end_and_again_the_same(codec_dir: Path, tmp_path: Path) -> None:
    wanted = QUICK.model_copy(update={"teacher_weight": 0.3})
    policies = []
    for name in ("one", "two"):
        report = train_sft(codec_dir, small_world.histories(24), wanted, tmp_path / name, texts=["lamp"])
        assert report.losses[-1] < report.losses[0]
        policies.append(Policy.load(tmp_path / name))
    for mine, theirs in zip(*(policy.model.parameters() for policy in policies), strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)
    listed = policies[0].recommend([UserContext("u", ("item-000", "item-006"))], 10)[0]
    assert len({one.item_id for one in listed}) == 10


def test_a_checkpoint_is_of_these_users_codes_alone(codec_dir: Path, tmp_path: Path) -> None:
    codec = ScidCodec.load(codec_dir)
    indexed = index_histories(codec, [["item-001", "item-002"]])
    assert codec.vectors is not None
    moved = ItemVectors.of(codec.vectors.text, codec.vectors.behaviour + 1)
    other = ScidCodec(
        codec.item_ids, codec.codes, codec.sizes, quantizer_hash=codec.quantizer_hash,
        user_sizes=codec.user_sizes, vectors=moved, source=codec_dir,
    )  # fmt: skip
    stranger = tiny_user_codec(tmp_path / "stranger", items=60, seed=1)
    assert stranger.quantizer_hash != codec.quantizer_hash  # the user module is in it
    keys = {run_key(one, indexed, QUICK, []) for one in (codec, other, stranger)}
    assert len(keys) == 3
    assert run_key(ScidCodec.load(codec_dir), indexed, QUICK, []) in keys


# Preferences and evaluation


def test_preference_samples_hold_the_users_and_their_fingerprint_moves_with_them(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    names = item_ids(60)
    table = pa.table(
        {
            "sample_id": ["a", "b", "c"],
            "history": [names[:4], [], [*names[5:30], "unknown"]],
            "chosen": [names[40], names[41], names[42]],
            "rejected": [names[50:53], names[53:55], names[55:57]],
        }
    )
    samples = encode_samples(table, tokens, 20)
    assert list(samples.prompts) == [prompt_ids(tokens, history) for history in table["history"].to_pylist()]
    assert samples.fingerprint == encode_samples(table, tokens, 20).fingerprint

    assert codec.vectors is not None
    other = ScidCodec(
        codec.item_ids, codec.codes, codec.sizes, quantizer_hash=codec.quantizer_hash,
        user_sizes=codec.user_sizes, source=codec.source,
        vectors=ItemVectors.of(-codec.vectors.text, -codec.vectors.behaviour),
    )  # fmt: skip
    moved = encode_samples(table, PromptTokens(tiny_tokenizer(other), other), 20)
    assert list(moved.answers) == list(samples.answers)
    assert list(moved.prompts) != list(samples.prompts)
    assert moved.fingerprint != samples.fingerprint
    empty = encode_samples(table.slice(0, 0), tokens, 20)
    assert list(empty.prompts) == []


def test_a_stage_learns_behind_prompts_with_the_user(codec_dir: Path, tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "v1", codec=ScidCodec.load(codec_dir))
    run = a_run(tmp_path / "easy", tmp_path)
    result = run_stage(tmp_path / "v1", preference_table(60), EASY, SETTINGS, run)
    assert result.last["loss"] < 0.7 * result.first["loss"]
    policy = Policy.load(result.policy, policies=tmp_path)
    assert policy.codec.user_sizes == (4, 5, 3)
    assert len(policy.recommend([UserContext("u", ("item-001",))], 5)[0]) == 5


def test_items_are_scored_behind_the_prompt_with_the_user(codec_dir: Path, tmp_path: Path) -> None:
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=ScidCodec.load(codec_dir)))
    names = item_ids(60)
    asked = [(names[3:8], names[20:23]), ([], names[30:31]), (names[:30], names[40:42])]
    for (history, items), scores in zip(asked, log_probs(policy, asked), strict=True):
        for item, score in zip(items, scores, strict=True):
            prompt, answer = prompt_ids(policy.tokens, history), answer_ids(policy.tokens, item)
            with torch.no_grad():
                logits = policy.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            expected = sum(float(logits[place, token]) for place, token in zip(places, answer, strict=True))
            assert score == pytest.approx(expected, abs=1e-4)


def test_new_items_enter_a_codec_with_users(codec_dir: Path, tmp_path: Path) -> None:
    parent, out = tmp_path / "v1", tmp_path / "grown"
    ScidCodec.load(codec_dir).save(parent / "codec")
    count = grow_codec(parent, small_world.items(64), out)
    grown = grown_codec(out)
    assert grown is not None
    assert count == 4
    assert len(grown) == 64
    old = ScidCodec.load(codec_dir)
    old.require_same_quantizer(grown)
    histories = [item_ids(60)[n : n + 5] for n in range(40)]
    assert grown.encode_users(histories).tolist() == old.encode_users(histories).tolist()
    assert grown.encode_users([["item-062", "item-001"]]).shape == (1, 3)
    assert grow_codec(parent, small_world.items(64), out) == 4
