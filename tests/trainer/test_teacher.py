"""The sequential-rules teacher: its formula, and what distilling it costs and gives."""

from pathlib import Path

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec
from policies.prompt import PromptTokens, answer_ids, prompt_ids
from policies.scoring import pack, token_log_probs
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, model_for, rows_of
from trainer.sft.base_policy import token_map, train_sft
from trainer.sft.data import branches_of, tree_batch, windows_of
from trainer.sft.teacher import Teacher
from trainer.sft.training import accumulate, sample_logits, sample_losses

pytestmark = pytest.mark.usefixtures("one_thread")


def rules_by_hand(histories: list[list[int]], user: int, position: int) -> dict[int, float]:
    """The formula of trainer.sft.teacher, loops and all; the user's own history is not counted."""
    count = {i: sum(history.count(i) for history in histories) for history in histories for i in history}
    history, scores = histories[user][:position], {}
    for place, voter in enumerate(reversed(history[-10:]), start=1):
        for other, pairs in enumerate(histories):
            if other == user or voter not in pairs:
                continue
            at = pairs.index(voter)
            for distance, item in enumerate(pairs[at + 1 :], start=1):
                if item not in history:
                    vote = 1 / place / distance / count[voter] ** 0.5
                    scores[item] = scores.get(item, 0.0) + vote
    total = sum(scores.values())
    return {item: score / total for item, score in scores.items()}


def test_the_teacher_is_its_formula_and_never_quotes_the_user() -> None:
    random = np.random.default_rng(0)
    histories = [random.permutation(12)[: int(random.integers(1, 12))] for _ in range(15)]
    teacher = Teacher.of(histories, 12, keep=12, weight=0.5)
    for user, history in enumerate(histories):
        for position in range(1, len(history)):
            row = teacher.first[user] + position - 1
            items, shares = teacher.items[row], teacher.shares[row]
            found = {int(i): float(s) for i, s in zip(items, shares, strict=True) if i >= 0}
            expected = rules_by_hand([h.tolist() for h in histories], user, position)
            assert found.keys() == expected.keys()
            assert all(found[item] == pytest.approx(expected[item], abs=1e-6) for item in found)
            assert shares.tolist() == sorted(shares.tolist(), reverse=True)


def test_the_soft_loss_is_the_cross_entropy_over_items_on_average(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    """-sum_j q(j) log pi(j): exactly over all candidates, and as trained, averaged over the draws of y."""
    histories = rows_of(codec, [5, 6, 7, 8, 9] * 6)
    teacher = Teacher.of(histories, len(codec), keep=6, weight=0.7)
    windows = windows_of(histories)[:1]
    model = model_for(codec)
    names, exact = codec.item_ids, 0.0
    with torch.no_grad():
        for position in range(1, len(histories[0])):
            q = {int(histories[0][position]): 0.3}
            row = teacher.first[0] + position - 1
            for item, share in zip(teacher.items[row].tolist(), teacher.shares[row].tolist(), strict=True):
                if item >= 0:
                    q[item] = q.get(item, 0.0) + 0.7 * share
            prompt = prompt_ids(tokens, [names[i] for i in histories[0][:position]])
            answers = [answer_ids(tokens, names[item]) for item in q]
            scores = token_log_probs(model, pack([prompt], [answers], tokens.pad))[0].sum(dim=1)
            exact -= float((scores * torch.tensor(list(q.values()))).sum())
        draws = []
        for seed in range(300):
            branches = teacher.blend(branches_of(windows), np.random.default_rng(seed))
            batch = tree_batch(branches, token_map(tokens))
            draws.append(float(sample_losses(sample_logits(model, batch), batch).sum()))
    error = np.std(draws) / np.sqrt(len(draws))
    # Four standard errors of the mean of fixed draws.
    assert np.mean(draws) == pytest.approx(exact, abs=4 * error)
    assert error < 0.05 * exact


def test_a_teacher_that_knows_nothing_leaves_the_target_hard(codec: ScidCodec, tokens: PromptTokens) -> None:
    histories = rows_of(codec, [5])
    teacher = Teacher.of(histories, len(codec), keep=4, weight=0.9)
    windows, model = windows_of(histories), model_for(codec)
    taught, plain = (
        accumulate(model, windows, token_map(tokens), QUICK, np.random.default_rng(0), "cpu", None, one)[0]
        for one in (teacher, None)
    )
    assert taught == pytest.approx(plain, abs=1e-6)


def test_a_taught_step_may_be_split(codec: ScidCodec, tokens: PromptTokens) -> None:
    histories = rows_of(codec, [5, 6, 7, 8, 9] * 6)
    teacher = Teacher.of(histories, len(codec), keep=6, weight=0.5)
    losses = []
    for micro in (None, 9):
        wanted = QUICK.model_copy(update={"micro_samples": micro})
        losses.append(
            accumulate(
                model_for(codec), windows_of(histories), token_map(tokens), wanted,
                np.random.default_rng(0), "cpu", None, teacher,
            )[0]
        )  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_taught_policy_trains_end_to_end(codec_dir: Path, tmp_path: Path) -> None:
    wanted = QUICK.model_copy(update={"teacher_weight": 0.5})
    report = train_sft(codec_dir, small_world.histories(24), wanted, tmp_path / "policy")
    assert report.losses[-1] < report.losses[0]
