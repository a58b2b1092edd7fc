"""One prompt, many answers: the packed computation is the naive one, in values and in gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from policies.errors import ScoringError
from policies.scoring import answer_log_probs, pack, token_log_probs
from tests.policies.factory import tiny_model

VOCABULARY = 60
PAD = 2
# fp32 on a model whose log-probabilities are of order 10: rounding is about 1e-6 relative.
TOLERANCE = 1e-5


def batch(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts of 12, 1, 5 and 3 tokens with 4, 1, 3 and 2 answers of 3 tokens; two answers share codes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    prompts = [draw(length) for length in (12, 1, 5, 3)]
    answers = [[draw(3) for _ in range(count)] for count in (4, 1, 3, 2)]
    answers[0][1][:2] = answers[0][0][:2]
    return prompts, answers


def naive(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """A sequence of its own, no mask, no positions: what every textbook does."""
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(dim=1)
    places = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return log_probs[places, torch.tensor(answer)].sum()


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_scores_and_lora_gradients_equal_one_sequence_per_answer(
    style: str, checkpointing: bool
) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(VOCABULARY, style=style), config)
    prompts, answers = batch()
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0], [1.5, 0, 0, 0], [-1, 2, 1, 0], [0.3, -0.7, 0, 0]])

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    expected = torch.zeros(4, 4)
    for row, (prompt, several) in enumerate(zip(prompts, answers, strict=True)):
        for place, answer in enumerate(several):
            score = naive(model, prompt, answer)
            (weights[row, place] * score).backward()
            expected[row, place] = score.detach()
    wanted = gradients()

    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = pack(prompts, answers, PAD)
    scores = answer_log_probs(model, packed)
    (weights * scores).sum().backward()
    got = gradients()

    assert packed.answer_mask.sum(dim=1).tolist() == [4, 1, 3, 2]
    torch.testing.assert_close(scores, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(got) == len(wanted) > 0
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for left, right in zip(got, wanted, strict=True):
        torch.testing.assert_close(left / scale, right / scale, atol=TOLERANCE, rtol=0)


def test_answers_of_any_length_stand_in_one_batch() -> None:
    model = tiny_model(VOCABULARY)
    prompts, answers = [[5, 6, 7], [8]], [[[9], [10, 11, 12, 13]], [[14, 15]]]
    with torch.no_grad():
        packed = pack(prompts, answers, PAD)
        scores = answer_log_probs(model, packed)
        expected = [
            [naive(model, p, a).item() for a in several] for p, several in zip(prompts, answers, strict=True)
        ]
        terms = token_log_probs(model, packed)
    assert scores[0].tolist() == pytest.approx(expected[0], rel=TOLERANCE)
    assert scores[1].tolist() == pytest.approx([*expected[1], 0.0], rel=TOLERANCE)
    assert packed.token_mask.tolist() == [
        [[True, False, False, False], [True] * 4],
        [[True, True, False, False], [False] * 4],
    ]
    assert terms[0, 1].sum().item() == pytest.approx(expected[0][1], rel=TOLERANCE)


def test_single_token_answers_need_no_slots() -> None:
    model = tiny_model(VOCABULARY)
    packed = pack([[5, 6, 7]], [[[9], [10], [11]]], PAD)
    with torch.no_grad():
        scores = answer_log_probs(model, packed)[0].tolist()
        expected = [naive(model, [5, 6, 7], [token]).item() for token in (9, 10, 11)]
    assert packed.input_ids.shape == (1, 3)
    assert scores == pytest.approx(expected, rel=TOLERANCE)


def test_the_layout_is_the_documented_one() -> None:
    answers = [[[10, 11, 12]], [[20, 21, 22], [30, 31, 32], [20, 21, 40], [20, 50, 21]]]
    packed = pack([[5, 6], [7]], answers, PAD)
    assert packed.input_ids.tolist() == [[5, 6, 10, 11, PAD, PAD, PAD], [PAD, 7, 20, 30, 21, 50, 31]]
    assert packed.position_ids[0, :4].tolist() == [0, 1, 2, 3]
    assert packed.position_ids[1].tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert packed.allowed[1].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 0, 0],
        [0, 1, 1, 0, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 1, 0, 1, 0, 0, 1],
    ]
    read = packed.input_ids.flatten()[packed.places]
    assert read.tolist() == [6, 7, 10, 20, 30, 11, 21, 50, 31]
    assert read[packed.predicts[1]].tolist() == [[7, 20, 21], [7, 30, 31], [7, 20, 21], [7, 20, 50]]


codes = st.integers(10, 13)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=6),
            st.lists(st.lists(codes, min_size=1, max_size=4), min_size=1, max_size=9),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_answers_that_share_codes_are_scored_as_if_they_stood_alone(
    cases: list[tuple[list[int], list[list[int]]]],
) -> None:
    model = tiny_model(VOCABULARY)
    prompts, answers = [prompt for prompt, _ in cases], [several for _, several in cases]
    packed = pack(prompts, answers, PAD)
    with torch.no_grad():
        scores = answer_log_probs(model, packed)
        for row, (prompt, several) in enumerate(cases):
            expected = [naive(model, prompt, answer).item() for answer in several]
            assert scores[row, : len(several)].tolist() == pytest.approx(expected, rel=TOLERANCE)
    assert packed.input_ids.shape[1] - max(map(len, prompts)) == max(
        len({tuple(answer[:end]) for answer in several for end in range(1, len(answer))})
        for several in answers
    )


def test_an_attention_that_would_misread_the_mask_is_refused() -> None:
    model = tiny_model(VOCABULARY)
    model.config._attn_implementation = "eager"
    with pytest.raises(ScoringError, match="sdpa"):
        answer_log_probs(model, pack([[5]], [[[6, 7]]], PAD))


@pytest.mark.parametrize(
    ("prompts", "answers"),
    [([], []), ([[1]], []), ([[]], [[[1]]]), ([[1]], [[]]), ([[1]], [[[]]])],
)
def test_nothing_to_score_is_an_error(prompts: list[list[int]], answers: list[list[list[int]]]) -> None:
    with pytest.raises(ScoringError):
        pack(prompts, answers, PAD)
