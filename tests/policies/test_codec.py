"""Codec, trie and prompt: one SCID is one item, maps only grow, text can never produce an item."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.codec import ScidCodec, scid_tokens, user_scid_tokens
from policies.errors import CodecError, PolicyRefused
from policies.prompt import HISTORY, PromptTokens, answer_ids, extend_tokenizer, prompt_ids, text_ids
from policies.trie import ScidTrie
from tests.policies.factory import item_ids, tiny_codec, tiny_tokenizer


@st.composite
def codecs(draw: st.DrawFn) -> ScidCodec:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    every = list(product(*(range(size) for size in sizes)))
    count = draw(st.integers(1, min(len(every), 40)))
    codes = draw(st.permutations(every))[:count]
    return ScidCodec(item_ids(count), np.array(codes), sizes, quantizer_hash="q")


@given(codec=codecs())
def test_every_item_has_its_scid_and_every_scid_its_item(codec: ScidCodec) -> None:
    found = {item_id: codec.encode(item_id) for item_id in codec.item_ids}
    assert len(set(found.values())) == len(codec)
    assert all(codec.decode(scid) == item_id for item_id, scid in found.items())


@given(codec=codecs())
def test_the_trie_allows_exactly_the_prefixes_of_items(codec: ScidCodec) -> None:
    trie = ScidTrie.of(codec)
    scids = {codec.encode(item_id) for item_id in codec.item_ids}
    for depth in range(codec.levels):
        for prefix in product(*(range(size) for size in codec.sizes[:depth])):
            following = sorted({scid[depth] for scid in scids if scid[:depth] == prefix})
            assert trie.allowed(prefix) == following
    assert trie.allowed(next(iter(scids))) == []
    order = [codec.encode(codec.item_ids[row]) for row in trie.item_of_leaf]
    assert order == sorted(scids)
    assert trie.leaf_of_item[trie.item_of_leaf].tolist() == list(range(len(codec)))


@given(codec=codecs(), data=st.data())
def test_prefix_sums_count_the_eligible_items_below_a_node(codec: ScidCodec, data: st.DataObject) -> None:
    trie = ScidTrie.of(codec)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(codec), max_size=len(codec))))
    alive = trie.alive(mask)
    prefixes = sorted({tuple(codes[:1]) for codes in codec.codes.tolist()})
    first = trie.levels[0].first_leaf
    for node, prefix in enumerate(prefixes):
        expected = sum(
            bool(ok) for ok, codes in zip(mask, codec.codes.tolist(), strict=True) if codes[0] == prefix[0]
        )
        assert alive[first[node + 1]] - alive[first[node]] == expected


def test_the_trie_of_a_large_catalogue_stays_small() -> None:
    codec = tiny_codec(200_000, (256, 256, 256, 16))
    trie = ScidTrie.of(codec)
    assert len(trie.levels) == 4
    assert trie.bytes < 40 * len(codec)


@pytest.mark.parametrize(
    ("names", "codes", "message"),
    [
        (["a", "b"], [[0, 1], [0, 1]], "'a' and 'b' share the SCID"),
        (["a", "a"], [[0, 1], [1, 1]], "'a' stands twice"),
        (["a", "b"], [[0, 1], [0, 2]], "'b' has SCID .* outside"),
        (["a", "b"], [[0, 1], [-1, 0]], "'b' has SCID .* outside"),
    ],
)
def test_a_codec_that_would_be_ambiguous_cannot_be_made(
    names: list[str], codes: list[list[int]], message: str
) -> None:
    with pytest.raises(CodecError, match=message):
        ScidCodec(names, np.array(codes), (2, 2), quantizer_hash="q")


def test_extending_keeps_what_was_there_and_refuses_what_is_taken() -> None:
    codec = tiny_codec(20, (4, 4, 4))
    free = next(c for c in product(range(4), repeat=3) if list(c) not in codec.codes.tolist())
    longer = codec.extend(["new"], np.array([free]))
    assert longer.decode(free) == "new"
    assert longer.quantizer_hash == codec.quantizer_hash
    assert longer.item_map_hash != codec.item_map_hash
    assert [longer.encode(item_id) for item_id in codec.item_ids] == [
        codec.encode(item_id) for item_id in codec.item_ids
    ]
    longer.require_same_quantizer(codec)
    codec.require_same_quantizer(longer)
    with pytest.raises(CodecError, match="has an SCID already"):
        longer.extend(["new"], np.array([free]))
    with pytest.raises(CodecError, match="share the SCID"):
        longer.extend(["newer"], np.array([free]))


def test_another_tokenizer_under_a_policy_is_refused_with_the_way_out() -> None:
    codec = tiny_codec(20, (4, 4, 4))
    strangers = [
        tiny_codec(20, (4, 4, 4), quantizer="other"),
        tiny_codec(20, (4, 4, 8)),
        tiny_codec(20, (4, 4, 4), seed=1),
    ]
    for other in strangers:
        with pytest.raises(PolicyRefused, match=r"codec mismatch: .*align3gr sft"):
            codec.require_same_quantizer(other)


def test_unknown_items_and_scids_are_errors() -> None:
    codec = tiny_codec(3, (4, 4, 4))
    with pytest.raises(CodecError, match="'nobody' has no SCID"):
        codec.encode("nobody")
    taken = codec.codes.tolist()
    free = next(c for c in product(range(4), repeat=3) if list(c) not in taken)
    with pytest.raises(CodecError, match="no item has the SCID"):
        codec.decode(free)
    with pytest.raises(CodecError, match="holds no quantizer"):
        codec.encoder()


def test_a_saved_codec_comes_back_and_a_damaged_one_does_not(tmp_path: Path) -> None:
    codec = ScidCodec(["é", "b\n", "c"], np.array([[0, 1], [1, 0], [1, 1]]), (2, 2), quantizer_hash="q")
    codec.save(tmp_path / "codec")
    back = ScidCodec.load(tmp_path / "codec")
    assert back.item_ids == codec.item_ids
    assert back.codes.tolist() == codec.codes.tolist()
    assert (back.item_map_hash, back.quantizer_hash) == (codec.item_map_hash, codec.quantizer_hash)

    facts = json.loads((tmp_path / "codec" / "codec.json").read_text())
    (tmp_path / "codec" / "items.json").write_text(json.dumps(["é", "c", "b\n"]))
    with pytest.raises(PolicyRefused, match="item map is not the one"):
        ScidCodec.load(tmp_path / "codec")
    (tmp_path / "codec" / "codec.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(PolicyRefused, match="format 99"):
        ScidCodec.load(tmp_path / "codec")
    (tmp_path / "codec" / "codec.json").write_text("{")
    with pytest.raises(PolicyRefused, match="cannot be read"):
        ScidCodec.load(tmp_path / "codec")


def test_token_strings_name_level_and_code() -> None:
    assert scid_tokens((2, 1, 3)) == ["<a_0>", "<a_1>", "<b_0>", "<c_0>", "<c_1>", "<c_2>"]
    assert user_scid_tokens((1, 2)) == ["<ua_0>", "<ub_0>", "<ub_1>"]


def test_a_prompt_is_begin_history_and_recommend() -> None:
    codec = tiny_codec(60)
    tokenizer = tiny_tokenizer(codec)
    tokens = PromptTokens(tokenizer, codec)
    history = [*item_ids(60)[:30], "unknown", "item-031"]
    ids = prompt_ids(tokens, history)
    expected = [*item_ids(60)[11:30], "item-031"]
    assert len(expected) == HISTORY
    words = [
        f"<{letter}_{code}>"
        for item_id in expected
        for letter, code in zip("abc", codec.encode(item_id), strict=True)
    ]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *words, "<recommend>"]
    assert len(ids) == tokens.longest
    assert tokenizer.convert_ids_to_tokens(answer_ids(tokens, "item-031")) == words[-3:]
    assert prompt_ids(tokens, []) == [tokenizer.bos_token_id, tokens.recommend]
    with pytest.raises(CodecError, match="has no SCID"):
        answer_ids(tokens, "unknown")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(tiny_codec(20))


@settings(max_examples=50, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<a_1>", "<recommend>", "<s>", "<pad>", "</s>", " ", "red", "<", "a_1>"]))
)
def test_text_never_produces_a_special_token(tokenizer: Any, text: list[str]) -> None:
    ids = text_ids(tokenizer, "".join(text))
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(special) > 24
    assert not special & set(ids)
    assert tokenizer.decode(ids) == "".join(text)
    assert text_ids(tokenizer, "<a_1>") == text_ids(tokenizer, "<a_1") + text_ids(tokenizer, ">")


def test_extending_a_tokenizer_twice_adds_nothing() -> None:
    codec = tiny_codec(20)
    tokenizer = tiny_tokenizer(codec)
    size = len(tokenizer)
    assert extend_tokenizer(tokenizer, codec) == 0
    assert len(tokenizer) == size


def test_a_tokenizer_without_the_codecs_tokens_is_refused() -> None:
    with pytest.raises(PolicyRefused, match="no token <a_8>"):
        PromptTokens(tiny_tokenizer(tiny_codec(20)), tiny_codec(20, (16, 8, 8)))


def test_the_package_is_cheap_until_a_policy_is_asked_for() -> None:
    code = (
        "import sys, policies, policies.settings, policies.ledger, policies.directory\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert policies.ScidCodec.__name__ == 'ScidCodec' and 'torch' not in sys.modules\n"
        "assert policies.Policy.__name__ == 'Policy' and 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
