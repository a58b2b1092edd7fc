"""A step learns exactly what 21 separate sequences a sample would teach, on every family of models."""

from pathlib import Path

import pytest
import torch

from policies.policy import Policy
from tests.policies.factory import write_tiny_policy
from tests.trainer.test_stage import preference_table
from trainer.preference.learner import Learner
from trainer.preference.loss import Responses, preference_loss
from trainer.preference.samples import Samples, encode_samples
from trainer.ranks import Ranks
from trainer.settings import PreferenceSettings, StageSettings

pytestmark = pytest.mark.usefixtures("one_thread")

STAGE = StageSettings(name="step", data="easy", beta=0.7, learning_rate=1e-12, anchor=0.1)
WHOLE = {"batch_size": 3, "lora_rank": 4, "lora_alpha": 8, "gradient_norm": 1e9}


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_losses_and_lora_gradients_equal_a_sequence_an_answer(style: str, tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "v1", style=style)
    policy = Policy.load(tmp_path / "v1", trainable=True)
    torch.manual_seed(1)
    learner = Learner(policy, STAGE, PreferenceSettings(micro_batch=2, **WHOLE), Ranks())
    samples = encode_samples(twenty_rejected(), policy.tokens, 20)
    reference = learner.responses(samples)
    with torch.no_grad():  # now the policy is no longer its reference, and every matrix has a gradient
        for weight in learner.weights:
            weight.add_(0.05 * torch.randn_like(weight))

    row = learner.step(samples, reference, [0, 1, 2], 0, 1)
    got = [weight.grad.clone() for weight in learner.weights if weight.grad is not None]
    for weight in learner.weights:
        weight.grad = None
    expected = naive_loss(learner, samples, reference)
    expected.backward()
    wanted = [weight.grad for weight in learner.weights if weight.grad is not None]

    assert samples.answers.counts.tolist() == [21, 21, 21]
    assert row["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert len(got) == len(wanted) == len(learner.weights)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine / scale, other / scale, atol=1e-5, rtol=0)


def naive_loss(learner: Learner, samples: Samples, reference: Responses) -> torch.Tensor:
    """Every answer as a sequence of its own: no mask, no positions."""
    scores = torch.stack(
        [
            torch.stack([naive(learner, samples.prompts[number], answer) for answer in several])
            for number, several in enumerate(samples.answers)
        ]
    )
    now = Responses(scores[:, 0], scores[:, 1:], reference.mask, reference.fork)
    return preference_loss(now, reference, learner.stage, samples.answers.length).mean()


def naive(learner: Learner, prompt: list[int], answer: list[int]) -> torch.Tensor:
    log_probs = learner.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return log_probs.float().log_softmax(dim=1)[places, torch.tensor(answer)].sum()


def twenty_rejected() -> object:
    """Three samples that reject 20 items each, with prompts of different length."""
    import pyarrow.compute as pc

    table = preference_table(120)
    return table.filter(pc.equal(pc.list_value_length(table.column("rejected")), 20)).slice(0, 3)
