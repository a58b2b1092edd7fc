"""Items with a token of their own: what prompts look like, and that training reads what serving writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from policies.codec import ScidCodec
from policies.policy import Policy, UserContext
from policies.prompt import PromptTokens, answer_ids, extend_tokenizer, item_token, prompt_ids
from policies.scoring import pack, token_log_probs
from tests.policies.factory import tiny_model, tiny_tokenizer
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, rows_of
from trainer.sft.base_policy import most_frequent, token_map, train_sft
from trainer.sft.data import branches_of, spell, tree_batch, windows_of
from trainer.sft.training import sample_logits
from trainer.slates import log_probs

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = list(range(0, 60, 2))
"""Rows of the codec with a token of their own."""


@pytest.fixture(scope="module")
def own(codec: ScidCodec) -> PromptTokens:
    tokenizer = tiny_tokenizer(codec)
    extend_tokenizer(tokenizer, codec, items=OWN)
    return PromptTokens(tokenizer, codec)


def test_an_item_is_its_own_token_in_a_history_and_its_codes_in_an_answer(
    codec: ScidCodec, own: PromptTokens, tokens: PromptTokens
) -> None:
    even, odd = codec.item_ids[4], codec.item_ids[7]
    prompt = prompt_ids(own, [even, odd])
    assert prompt == [*own.begin, int(own.own[4]), *answer_ids(tokens, odd), own.recommend]
    assert answer_ids(own, even) == answer_ids(tokens, even)
    assert own.highest == int(own.own.max())
    assert prompt_ids(tokens, [even]) == [*tokens.begin, *answer_ids(tokens, even), tokens.recommend]


def test_an_item_that_came_later_is_shown_by_its_codes(codec: ScidCodec, own: PromptTokens) -> None:
    tokenizer = tiny_tokenizer(codec)
    extend_tokenizer(tokenizer, codec, items=OWN)
    free = next(
        (a, b, c)
        for a in range(8) for b in range(8) for c in range(8)
        if (a, b, c) not in {tuple(row) for row in codec.codes.tolist()}
    )  # fmt: skip
    longer = PromptTokens(tokenizer, codec.extend(["new"], np.array([free])))
    old = codec.item_ids[4]
    assert prompt_ids(longer, [old]) == prompt_ids(own, [old])
    assert len(prompt_ids(longer, ["new"])) == len(own.begin) + 3 + 1


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_packed_rows_are_the_prompts_that_serving_writes(
    share: float, codec: ScidCodec, own: PromptTokens, tokens: PromptTokens
) -> None:
    histories = rows_of(codec, [6, 2, 9, 4])
    model = tiny_model(own.highest + 1)
    model.config.read_only_from = int(own.own[own.own >= 0].min())
    branches = branches_of(windows_of(histories))
    if share:
        branches = spell(branches, share, np.random.default_rng(0))
    batch = tree_batch(branches, token_map(own))
    with torch.no_grad():
        logits = sample_logits(model, batch)
    packed = -F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none").view(-1, 3)
    prompts, answers = [], []
    for row, history in enumerate(histories):
        for place in range(1, len(history)):
            prompt = list(own.begin)
            for at, item in enumerate(history[:place]):
                by_codes = branches.spelled is not None and bool(branches.spelled[row, at])
                prompt += (tokens if by_codes else own).body(np.array([item])).tolist()
            prompts.append([*prompt, own.recommend])
            answers.append([answer_ids(own, codec.item_ids[history[place]])])
            if not share:
                assert prompts[-1] == prompt_ids(own, [codec.item_ids[i] for i in history[:place]])
    with torch.no_grad():
        separate = token_log_probs(model, pack(prompts, answers, own.pad))[:, 0]
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=1e-5)


def test_the_most_frequent_items_get_tokens() -> None:
    histories = [np.array([3, 1, 2]), np.array([3, 2]), np.array([3, 5])]
    assert most_frequent(histories, 7, 2) == [2, 3]
    assert most_frequent(histories, 7, 100) == [1, 2, 3, 5]
    assert most_frequent(histories, 7, 0) == []


def test_a_policy_with_item_tokens_trains_serves_and_says_which(codec_dir: Path, tmp_path: Path) -> None:
    wanted = QUICK.model_copy(update={"item_tokens": 10})
    report = train_sft(codec_dir, small_world.histories(24), wanted, tmp_path / "policy")
    assert report.losses[-1] < report.losses[0]
    policy = Policy.load(tmp_path / "policy")
    rows = np.flatnonzero(policy.tokens.own >= 0)
    assert len(rows) == 10
    assert policy.tokenizer.convert_tokens_to_ids(item_token(int(rows[0]))) == policy.tokens.own[rows[0]]
    history = tuple(small_world.histories(24)[0][:4])
    listed = policy.recommend([UserContext("u", history, frozenset(history))], 5)[0]
    assert len({one.item_id for one in listed}) == 5
    # One definition of log pi: what is served, scored and trained leaves out what is never said.
    assert policy.model.config.read_only_from == policy.tokens.own[rows].min()
    scored = log_probs(policy, [(history, [one.item_id for one in listed])])[0]
    np.testing.assert_allclose(scored, [one.score for one in listed], atol=1e-4)
    logits = policy.model(torch.tensor([prompt_ids(policy.tokens, history)])).logits[0, -1]
    codes = answer_ids(policy.tokens, listed[0].item_id)
    said = logits[: policy.model.config.read_only_from].log_softmax(dim=0)[codes[0]]
    assert float(said.detach()) >= listed[0].score
    assert float(said.detach()) > float(logits.log_softmax(dim=0)[codes[0]].detach())
