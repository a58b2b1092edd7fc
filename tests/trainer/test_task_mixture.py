"""How tasks with text mix into a step of SFT: weights, splits, resumption, what a training reports."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec
from policies.prompt import PromptTokens
from tests.policies.factory import tiny_model, tiny_tokenizer, tiny_user_codec
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, rows_of
from tests.trainer.small_tasks import CATALOGUE, EVERY, mixture_of
from tests.trainer.test_packing import separate_losses
from trainer.settings import TaskSettings
from trainer.sft.base_policy import run_key, token_map, train_sft
from trainer.sft.data import windows_of
from trainer.sft.tasks import NO_TEXT, TASKS, CatalogueText
from trainer.sft.tasks.mixture import task_gradients
from trainer.sft.tasks.preview import preview_tasks
from trainer.sft.training import train_next_item
from trainer.sft.user_scids import UserScids

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> ScidCodec:
    """60 items with SCIDs for users too."""
    return tiny_user_codec(tmp_path_factory.mktemp("codec"), items=60)


@pytest.fixture(scope="module")
def tokenizer(codec: ScidCodec) -> Any:
    return tiny_tokenizer(codec)


def test_a_steps_loss_is_the_weighed_sum_of_each_tasks_mean(codec: ScidCodec, tokenizer: Any) -> None:
    weights = {"titles_to_item": 0.5, "item_to_text": 2.0, "user_to_profile": 0.1, "share": 0.125}
    settings = QUICK.model_copy(update={"tasks": TaskSettings(**weights)})  # type: ignore[arg-type]
    model = tiny_model(len(tokenizer))
    step = mixture_of(codec, tokenizer, model, settings).step(0, 3)
    assert np.bincount(step.task).tolist() == [4, 16, 1]  # an eighth of 64 a weight of 1
    losses, _ = task_gradients(model, step, "cpu", None)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    expected, total = {}, torch.zeros(())
    alone = separate_losses(model, step.samples)
    for index, (name, weight) in enumerate(zip(step.names, step.weights.tolist(), strict=True)):
        mine = [number for number, task in enumerate(step.task.tolist()) if task == index]
        sizes = [len(step.samples[number].target) for number in mine]
        mean = sum(alone[n] * size for n, size in zip(mine, sizes, strict=True)) / sum(sizes)
        expected[name] = float(mean.detach())
        total = total + weight * mean
    assert losses == pytest.approx(expected, abs=1e-5)
    total.backward()
    for mine_, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine_, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro", [1, 5])
def test_how_a_step_is_split_changes_no_gradient(micro: int, codec: ScidCodec, tokenizer: Any) -> None:
    settings = QUICK.model_copy(update={"tasks": TaskSettings(**EVERY), "samples_per_step": 24})  # type: ignore[arg-type]
    results = []
    for at_once in (None, micro):
        model = tiny_model(len(tokenizer)).double()
        step = mixture_of(codec, tokenizer, model, settings).step(1, 2)
        losses, _ = task_gradients(model, step, "cpu", None, at_once=at_once)
        results.append((losses, [parameter.grad for parameter in model.parameters()]))
    # The loss is taken in float32.
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_processes_of_a_step_add_up_to_its_gradient(codec: ScidCodec, tokenizer: Any) -> None:
    settings = QUICK.model_copy(update={"tasks": TaskSettings(**EVERY), "samples_per_step": 24})  # type: ignore[arg-type]
    whole, shared = tiny_model(len(tokenizer)).double(), tiny_model(len(tokenizer)).double()
    step = mixture_of(codec, tokenizer, whole, settings).step(1, 2)
    alone, _ = task_gradients(whole, step, "cpu", None)
    parts = [task_gradients(shared, step.part(3, index), "cpu", None)[0] for index in range(3)]
    assert {name: sum(part[name] for part in parts) for name in alone} == pytest.approx(alone, abs=1e-5)
    for one, other in zip(whole.parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


def trained(
    codec: ScidCodec, tokenizer: Any, checkpoint: Path | None = None, stop_after: int | None = None
) -> tuple[Any, Any]:
    settings = QUICK.model_copy(
        update={"tasks": TaskSettings(**EVERY), "checkpoint_every": 2, "samples_per_step": 40}  # type: ignore[arg-type]
    )
    model = tiny_model(len(tokenizer))
    mixture = mixture_of(codec, tokenizer, model, settings)
    histories = rows_of(codec, [5, 8, 3, 12, 30, 7] * 3)

    def progress(step: Any) -> None:
        if step.step == stop_after:
            raise KeyboardInterrupt

    return model, train_next_item(
        model, windows_of(histories), token_map(PromptTokens(tokenizer, codec)), settings,
        learning_rate=1e-2, checkpoint=checkpoint, run_key="k", progress=progress, mixture=mixture,
        scids=UserScids.of(codec, histories),
    )  # fmt: skip


def test_a_resumed_training_with_tasks_ends_as_an_uninterrupted_one(
    codec: ScidCodec, tokenizer: Any, tmp_path: Path
) -> None:
    straight, facts = trained(codec, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        trained(codec, tokenizer, tmp_path / "state", 7)
    resumed, again = trained(codec, tokenizer, tmp_path / "state")
    assert again.resumed_at == 6
    assert again.losses == facts.losses
    assert again.task_losses == facts.task_losses
    assert {len(losses) for losses in facts.task_losses.values()} == {2}
    assert sum(losses[1] < losses[0] for losses in facts.task_losses.values()) == len(TASKS)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_the_key_of_a_run_moves_with_the_text_that_tasks_read(codec: ScidCodec) -> None:
    histories = rows_of(codec, [5, 8])
    tasks = QUICK.model_copy(update={"tasks": TaskSettings(preference=0.5)})
    other = CatalogueText.of(small_world.items(59))
    keys = {run_key(codec, histories, tasks, [], one) for one in (CATALOGUE, other, NO_TEXT)}
    assert len(keys) == 3
    assert len({run_key(codec, histories, QUICK, [], one) for one in (CATALOGUE, other, NO_TEXT)}) == 1


def test_train_sft_reports_its_tasks_and_previews_what_it_learns(codec_dir: Path, tmp_path: Path) -> None:
    weights = {"text_to_item": 1.0, "items_to_title": 0.25, "share": 0.125}
    wanted = QUICK.model_copy(update={"tasks": TaskSettings(**weights)})  # type: ignore[arg-type]
    histories = small_world.histories(24)
    texts = [*CATALOGUE.lines.values()]
    shown = preview_tasks(codec_dir, histories, wanted, examples=2, texts=texts, catalogue=CATALOGUE)
    assert [one.task for one in shown] == ["next_item", "items_to_title", "text_to_item"]
    assert all(len(one.examples) == 2 for one in shown)
    assert all(one.target.startswith("<a_") for one in shown[2].examples)

    report = train_sft(codec_dir, histories, wanted, tmp_path / "one", texts=texts, catalogue=CATALOGUE)
    assert report.tasks["text_to_item"]["samples_per_step"] == 8
    assert (report.tasks["text_to_item"]["samples"], report.tasks["text_to_item"]["skipped"]) == (60, 0)
    losses = report.tasks["items_to_title"]["losses"]
    assert losses[1] < losses[0]
    everything = preview_tasks(
        codec_dir, histories, QUICK, examples=1, all_tasks=True, texts=texts, catalogue=CATALOGUE
    )
    assert [one.task for one in everything[1:]] == list(TASKS)
    assert [one.task for one in everything if one.missing] == ["profile_to_user", "user_to_profile"]
