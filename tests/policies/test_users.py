"""A user's SCID: the formula by a plain loop, one user alone or among many, before a save and after it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import BadInput
from policies.codec import ScidCodec
from policies.errors import CodecError, PolicyRefused
from policies.policy import Policy, UserContext
from policies.prompt import HISTORY, PromptTokens, prompt_ids, prompts_ids
from policies.users import MAX_HISTORY, InterestAttention, ItemVectors, UserEncoder
from tests.policies.factory import (
    item_ids,
    tiny_codec,
    tiny_tokenizer,
    tiny_user_codec,
    tiny_user_encoder,
    write_tiny_adapter,
    write_tiny_policy,
)
from tests.policies.test_decoding import exhaustive, users

ITEMS = 40
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=25), min_size=1, max_size=12)


def item_vectors(seed: int = 0) -> ItemVectors:
    draw = np.random.default_rng(seed)
    text, behaviour = draw.normal(size=(ITEMS, 6)), draw.normal(size=(ITEMS, 4))
    return ItemVectors.of(text.astype(np.float32), behaviour.astype(np.float32))


def rows(histories: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    return [np.array(history, dtype=np.int64) for history in histories]


def by_hand(unit: InterestAttention | None, items: ItemVectors, history: list[int]) -> np.ndarray[Any, Any]:
    """[mean text | sum a(h, t) h] in float64, loops and all."""
    kept = history[-20:]
    text, behaviour = items.text.astype(np.float64), items.behaviour.astype(np.float64)
    if not kept:
        return np.zeros(text.shape[1] + behaviour.shape[1])
    interest, target = np.zeros(behaviour.shape[1]), behaviour[kept[-1]]
    for item in kept:
        weight = 1 / len(kept)
        if unit is not None:
            both = np.concatenate([behaviour[item], target, behaviour[item] * target])
            hidden = [
                max(0.0, float(both @ column + b)) for column, b in zip(unit.hidden.T, unit.bias, strict=True)
            ]
            weight = float(np.dot(hidden, unit.out) + unit.offset[0])
        interest += weight * behaviour[item]
    return np.concatenate([sum(text[item] for item in kept) / len(kept), interest])


@settings(deadline=None, max_examples=60)
@given(histories=HISTORIES, attended=st.booleans())
def test_a_users_vector_is_the_formula(histories: list[list[int]], attended: bool) -> None:
    whole = tiny_user_encoder()
    encoder = UserEncoder(whole.quantizer, whole.attention if attended else None)
    found = encoder.vectors(item_vectors(), rows(histories))
    wanted = np.stack([by_hand(encoder.attention, item_vectors(), history) for history in histories])
    # float32 against float64, sums of 20 terms of up to about 100.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


@settings(deadline=None, max_examples=60)
@given(histories=HISTORIES)
def test_company_and_padding_change_no_users_vector(histories: list[list[int]]) -> None:
    encoder, items = tiny_user_encoder(), item_vectors()
    together = encoder.vectors(items, rows(histories))
    alone = np.concatenate([encoder.vectors(items, [one]) for one in rows(histories)])
    wide = np.full((len(histories), MAX_HISTORY), -1, dtype=np.int64)
    for row, history in enumerate(histories):
        wide[row, : len(history[-20:])] = history[-20:]
    # Another order of the same float32 additions.
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(together, encoder.vectors(items, wide), rtol=1e-5, atol=1e-4)


def test_company_changes_no_code_of_a_thousand_users(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    histories = [draw.integers(0, ITEMS, size=draw.integers(0, 30)) for _ in range(1_000)]
    encoder, items = tiny_user_encoder(), item_vectors()
    together = encoder.encode(items, histories)
    assert together.shape == (1_000, 3)
    assert together.dtype == np.int32
    assert len(np.unique(together, axis=0)) > 5
    assert [encoder.encode(items, [one])[0].tolist() for one in histories] == together.tolist()
    monkeypatch.setattr("policies.users.CHUNK", 7)
    assert encoder.encode(items, histories).tolist() == together.tolist()


@settings(deadline=None, max_examples=40)
@given(history=st.lists(st.integers(0, ITEMS - 1), min_size=20, max_size=20), old=HISTORIES)
def test_only_the_last_20_items_count(history: list[int], old: list[list[int]]) -> None:
    encoder, items = tiny_user_encoder(), item_vectors()
    vectors = encoder.vectors(items, rows([[*before, *history] for before in [[], *old]]))
    assert (vectors == vectors[0]).all()
    assert MAX_HISTORY == HISTORY == 20


def test_a_user_without_a_history_has_the_code_of_nothing(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path)
    assert not tiny_user_encoder().vectors(item_vectors(), rows([[], []])).any()
    found = codec.encode_users([[], ["unknown"], ["item-001"]])
    assert found[0].tolist() == found[1].tolist()
    assert codec.encode_users([]).shape == (0, 3)
    assert tiny_codec(5).encode_users([[], ["item-001"]]).shape == (2, 0)


def test_the_target_of_the_attention_is_the_latest_item() -> None:
    encoder, items = tiny_user_encoder(), item_vectors()
    there, back = encoder.vectors(items, rows([[1, 2, 3], [2, 1, 3]]))
    np.testing.assert_allclose(there, back, rtol=1e-5, atol=1e-5)
    other = encoder.vectors(items, rows([[3, 2, 1]]))[0]
    assert not np.allclose(there[6:], other[6:])


def test_vectors_and_codes_are_the_same_before_and_after_saving(tmp_path: Path) -> None:
    draw = np.random.default_rng(5)
    histories = [draw.integers(0, ITEMS, size=draw.integers(0, 30)) for _ in range(300)]
    encoder, items = tiny_user_encoder(), item_vectors()
    encoder.save(tmp_path / "users")
    items.save(tmp_path / "vectors.safetensors")
    read, back = UserEncoder.load(tmp_path / "users"), ItemVectors.load(tmp_path / "vectors.safetensors")
    assert (back.text == items.text).all()
    assert (back.behaviour == items.behaviour).all()
    assert back.as_bytes() == items.as_bytes()
    assert read.encode(back, histories).tolist() == encoder.encode(items, histories).tolist()
    UserEncoder(encoder.quantizer).save(tmp_path / "plain")
    assert UserEncoder.load(tmp_path / "plain").attention is None


def test_a_saved_codec_codes_users_as_before(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path / "codec")
    codec.save(tmp_path / "copy")
    copy = ScidCodec.load(tmp_path / "copy")
    histories = [item_ids(200)[n : n + n % 23] for n in range(150)]
    assert copy.encode_users(histories).tolist() == codec.encode_users(histories).tolist()
    assert (copy.item_map_hash, copy.quantizer_hash) == (codec.item_map_hash, codec.quantizer_hash)
    copy.require_same_quantizer(codec)


def test_items_that_mean_something_else_to_users_are_no_continuation(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path)
    assert codec.vectors is not None
    moved = ItemVectors.of(codec.vectors.text, codec.vectors.behaviour + 1)
    other = ScidCodec(
        codec.item_ids, codec.codes, codec.sizes, quantizer_hash=codec.quantizer_hash,
        user_sizes=codec.user_sizes, vectors=moved, source=tmp_path,
    )  # fmt: skip
    with pytest.raises(PolicyRefused, match="neither item map continues the other"):
        codec.require_same_quantizer(other)
    codec.require_same_quantizer(codec.grow({"new": "red lamp"}))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_vector_that_float16_cannot_hold_is_refused(value: float) -> None:
    text, behaviour = np.zeros((3, 6), np.float32), np.zeros((3, 4), np.float32)
    behaviour[1, 2] = value
    with pytest.raises(CodecError, match="not a number"):
        ItemVectors.of(text, behaviour)


# Growing


def test_a_codec_grows_with_new_items_and_still_codes_users(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path / "codec")
    texts = {"new-1": "red lamp", "new-2": "blue song", "new-3": "  ", "item-001": "known already"}
    grown = codec.grow(texts)
    assert grown.item_ids == (*codec.item_ids, "new-1", "new-2")
    assert grown.vectors is not None
    assert len(grown.vectors) == len(grown)
    old = [item_ids(200)[n : n + 9] for n in range(50)]
    assert grown.encode_users(old).tolist() == codec.encode_users(old).tolist()

    grown.save(tmp_path / "grown")
    back = ScidCodec.load(tmp_path / "grown")
    mixed = [["item-004", "new-1"], ["new-2"], ["new-1", "new-2", "item-009"]]
    assert back.encode_users(mixed).tolist() == grown.encode_users(mixed).tolist()
    # The vector of a new item is the one its own quantizer would be given, in float16.
    wanted = codec.encoder().vectors(["red lamp"]).astype(np.float16).astype(np.float32)
    assert (np.concatenate([back.vectors.text[200], back.vectors.behaviour[200]]) == wanted[0]).all()  # type: ignore[union-attr]
    tokens = PromptTokens(tiny_tokenizer(codec), back)
    assert len(prompt_ids(tokens, ["item-004", "new-1"])) == 1 + 2 * 3 + 3 + 1
    with pytest.raises(CodecError, match="needs the vectors of new items"):
        codec.extend(["new"], np.array([[7, 7, 7]]))


# The prompt


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ScidCodec:
    return tiny_user_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def tokenizer(codec: ScidCodec) -> Any:
    return tiny_tokenizer(codec)


def test_the_users_scid_stands_behind_the_history(codec: ScidCodec, tokenizer: Any) -> None:
    tokens = PromptTokens(tokenizer, codec)
    history = [*item_ids(200)[:30], "unknown", "item-150"]
    kept = [*item_ids(200)[11:30], "item-150"]
    user = [f"<u{x}_{code}>" for x, code in zip("abc", codec.encode_users([kept])[0], strict=True)]
    words = [
        f"<{letter}_{code}>" for item in kept for letter, code in zip("abc", codec.encode(item), strict=True)
    ]
    ids = prompt_ids(tokens, history)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *words, *user, "<recommend>"]
    assert len(ids) == tokens.longest == 1 + 20 * 3 + 3 + 1
    assert max(ids) <= tokens.highest < len(tokenizer)
    assert len(prompt_ids(tokens, [])) == 1 + 3 + 1


@settings(deadline=None, max_examples=30)
@given(
    histories=st.lists(st.lists(st.sampled_from([*item_ids(200)[:40], "unknown"]), max_size=30), max_size=9)
)
def test_prompts_written_together_are_those_written_alone(
    codec: ScidCodec, tokenizer: Any, histories: list[list[str]]
) -> None:
    tokens = PromptTokens(tokenizer, codec)
    assert prompts_ids(tokens, histories) == [prompt_ids(tokens, history) for history in histories]


def test_a_codec_without_scids_for_users_makes_the_prompt_it_always_made(
    codec: ScidCodec, tokenizer: Any
) -> None:
    plain = tiny_codec(200)
    tokens = PromptTokens(tiny_tokenizer(plain), plain)
    histories = [[], ["unknown"], item_ids(200)[:5], item_ids(200)[:33]]
    expected = [
        [*tokens.begin, *(t for item in tokens.known(one) for t in tokens.answer(item)), tokens.recommend]
        for one in histories
    ]
    assert prompts_ids(tokens, histories) == expected
    # Tokens of users stand behind those of items: item tokens keep their ids.
    assert [level.tolist() for level in PromptTokens(tokenizer, codec).levels] == [
        level.tolist() for level in tokens.levels
    ]


def test_a_tokenizer_without_the_users_tokens_is_refused(codec: ScidCodec) -> None:
    with pytest.raises(PolicyRefused, match="no token <ua_0>"):
        PromptTokens(tiny_tokenizer(tiny_codec(200)), codec)


# A policy


@pytest.fixture(scope="module")
def policies(codec: ScidCodec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    write_tiny_policy(folder / "v1", codec=codec)
    write_tiny_adapter(folder / "v2", folder / "v1")
    return folder


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_policy_recommends_by_the_prompt_with_the_users_scid(policies: Path, version: str) -> None:
    policy = Policy.load(policies / version)
    asked = [*users(12, seen=20), UserContext("new")]
    lists = policy.recommend(asked, 10, beam=200)
    for user, listed in zip(asked[:-1], lists[:-1], strict=True):
        scores = {name: s for name, s in exhaustive(policy, user).items() if name not in user.seen}
        # fp32 on log-probabilities of order 10, summed in another order.
        assert [one.score for one in listed] == pytest.approx(sorted(scores.values())[:-11:-1], abs=1e-4)
        assert all(scores[one.item_id] == pytest.approx(one.score, abs=1e-4) for one in listed)
    assert {one.source for one in lists[-1]} == {"popularity"}
    alone = [policy.recommend([user], 10, beam=200)[0] for user in asked]
    assert [[one.item_id for one in listed] for listed in alone] == [
        [one.item_id for one in listed] for listed in lists
    ]


def test_the_users_scid_is_read_by_the_model(policies: Path) -> None:
    policy = Policy.load(policies / "v1")
    user = UserContext("u", ("item-003", "item-007"))
    before = exhaustive(policy, user)
    tokens = policy.tokens
    there = tokens.users([tokens.rows(user.history)])
    tokens.user_levels = tuple(np.roll(level, 1) for level in tokens.user_levels)
    assert (tokens.users([tokens.rows(user.history)]) != there).all()
    assert max(abs(exhaustive(policy, user)[item] - score) for item, score in before.items()) > 0.1


def test_a_policy_samples_whole_slates_that_depend_on_seed_and_user_alone(policies: Path) -> None:
    policy = Policy.load(policies / "v1")
    asked = users(8, seen=20)
    slates = policy.sample(asked, 10, seed=3)
    for user, slate in zip(asked, slates, strict=True):
        names = [one.item_id for one in slate]
        assert len(set(names)) == 10
        assert not set(names) & user.seen
        assert all(one.propensity is not None and 0 < one.propensity <= 1 for one in slate)
        assert [one.item_id for one in policy.sample([user], 10, seed=3)[0]] == names


def test_a_policy_takes_items_that_came_after_it_into_prompts_and_lists(policies: Path) -> None:
    parent = Policy.load(policies / "v1")
    policy = Policy.load(policies / "v1", codec=parent.codec.grow({"brand-new": "red lamp"}))
    listed = policy.recommend([UserContext("u", ("brand-new", "item-003"))], 201, beam=201)[0]
    assert "brand-new" in {one.item_id for one in listed}


def test_a_loaded_policy_needs_its_files_no_more(policies: Path, tmp_path: Path) -> None:
    shutil.copytree(policies / "v1", tmp_path / "v1")
    policy = Policy.load(tmp_path / "v1")
    shutil.rmtree(tmp_path / "v1")
    assert len(policy.recommend([UserContext("u", ("item-003",))], 5)[0]) == 5


def test_a_model_that_does_not_embed_the_users_tokens_is_refused(codec: ScidCodec, tokenizer: Any) -> None:
    embeddings = SimpleNamespace(weight=np.empty((PromptTokens(tokenizer, codec).highest, 4)))
    with pytest.raises(PolicyRefused, match="the model embeds"):
        Policy(
            SimpleNamespace(version="v1"),  # type: ignore[arg-type]
            model=SimpleNamespace(
                parameters=lambda: iter([SimpleNamespace(device="cpu")]),
                get_input_embeddings=lambda: embeddings,
            ),
            tokenizer=tokenizer,
            codec=codec,
            popularity=[],
        )


# Damage


def cut_vectors(codec: Path) -> None:
    content = (codec / "vectors.safetensors").read_bytes()
    (codec / "vectors.safetensors").write_bytes(content[: len(content) // 2])


def lose_vectors(codec: Path) -> None:
    (codec / "vectors.safetensors").unlink()


def other_vectors(codec: Path) -> None:
    draw = np.random.default_rng(9).normal(size=(200, 10)).astype(np.float32)
    ItemVectors.of(draw[:, :6], draw[:, 6:]).save(codec / "vectors.safetensors")


def too_few_vectors(codec: Path) -> None:
    ItemVectors.of(np.zeros((3, 6), np.float32), np.zeros((3, 4), np.float32)).save(
        codec / "vectors.safetensors"
    )


def nameless_vectors(codec: Path) -> None:
    shutil.copy(codec / "codes.safetensors", codec / "vectors.safetensors")


def cut_attention(codec: Path) -> None:
    (codec / "quantizer" / "users" / "attention.safetensors").write_bytes(b"\x08")


def lose_attention(codec: Path) -> None:
    (codec / "quantizer" / "users" / "attention.safetensors").unlink()


def lose_module(codec: Path) -> None:
    shutil.rmtree(codec / "quantizer" / "users")


def lose_quantizer(codec: Path) -> None:
    shutil.rmtree(codec / "quantizer")


def other_sizes(codec: Path) -> None:
    facts = json.loads((codec / "codec.json").read_text())
    (codec / "codec.json").write_text(json.dumps(facts | {"user_sizes": [4, 5]}))


DAMAGES = [
    (cut_vectors, "cannot be read"),
    (lose_vectors, "cannot be read"),
    (other_vectors, "item map is not the one"),
    (too_few_vectors, "one vector an item"),
    (nameless_vectors, "cannot be read"),
    (cut_attention, "quantizer is not the one"),
    (lose_attention, "quantizer is not the one"),
    (lose_module, "quantizer is not the one"),
    (lose_quantizer, "holds no user module"),
    (other_sizes, "users' SCIDs are"),
]


@pytest.mark.parametrize(("damage", "cause"), DAMAGES)
def test_a_codec_that_cannot_code_users_is_refused_in_one_line_before_any_prompt(
    damage: Callable[[Path], None], cause: str, tokenizer: Any, tmp_path: Path
) -> None:
    tiny_user_codec(tmp_path / "codec")
    damage(tmp_path / "codec")
    with pytest.raises((PolicyRefused, CodecError), match=cause) as caught:
        PromptTokens(tokenizer, ScidCodec.load(tmp_path / "codec"))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, BadInput)


@pytest.mark.parametrize("damage", [cut_attention, lose_module])
def test_a_module_lost_after_the_codec_was_read_is_an_error_of_the_codec(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    codec = tiny_user_codec(tmp_path / "codec")
    damage(tmp_path / "codec")
    with pytest.raises(CodecError, match="cannot be read") as caught:
        codec.encode_users([["item-001"]])
    assert "\n" not in str(caught.value)


def test_vectors_of_another_width_are_refused(codec: ScidCodec, tokenizer: Any) -> None:
    narrow = ScidCodec(
        codec.item_ids, codec.codes, codec.sizes, quantizer_hash=codec.quantizer_hash,
        user_sizes=codec.user_sizes, source=codec.source,
        vectors=ItemVectors.of(np.zeros((200, 5), np.float32), np.zeros((200, 4), np.float32)),
    )  # fmt: skip
    with pytest.raises(PolicyRefused, match="the quantizer takes"):
        PromptTokens(tokenizer, narrow)
