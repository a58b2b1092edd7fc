"""The teacher: its formula, what its parts know, and what distilling it costs and gives."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec
from policies.prompt import PromptTokens, answer_ids, prompt_ids
from policies.scoring import pack, token_log_probs
from tests.trainer import small_world
from tests.trainer.small_sft import QUICK, model_for, rows_of, rules_teacher
from trainer.settings import SasRecSettings, TeacherShares
from trainer.sft.base_policy import SftReport, token_map, train_sft
from trainer.sft.data import branches_of, tree_batch, windows_of
from trainer.sft.teacher import Teacher
from trainer.sft.training import Step, accumulate, sample_logits, sample_losses
from trainer.sft.votes import SHRINK, like_texts, sequential_rules, shared_users

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
    teacher = rules_teacher(histories, 12, keep=12, weight=0.5)
    for user, history in enumerate(histories):
        for position in range(1, len(history)):
            row = teacher.first[user] + position - 1
            items, shares = teacher.items[row], teacher.shares[row]
            found = {int(i): float(s) for i, s in zip(items, shares, strict=True) if i >= 0}
            expected = rules_by_hand([h.tolist() for h in histories], user, position)
            assert found.keys() == expected.keys()
            assert all(found[item] == pytest.approx(expected[item], abs=1e-6) for item in found)
            assert shares.tolist() == sorted(shares.tolist(), reverse=True)


def users_by_hand(histories: list[list[int]], user: int, position: int) -> dict[int, float]:
    """Votes of shared users, loops and all; how often two items meet is counted without the user's own."""
    of = {item: {at for at, one in enumerate(histories) if item in one} for one in histories for item in one}
    history, scores = histories[user][:position], {}
    for place, voter in enumerate(reversed(history[-10:]), start=1):
        for item in sorted(of.keys() - set(history)):
            alike = len(of[voter] & of[item] - {user}) / ((len(of[voter]) * len(of[item])) ** 0.5 + SHRINK)
            scores[item] = scores.get(item, 0.0) + alike / place
    total = sum(scores.values())
    return {item: score / total for item, score in scores.items() if score > 0}


def test_votes_of_shared_users_are_their_formula_and_never_quote_the_user() -> None:
    random = np.random.default_rng(1)
    histories = [random.permutation(12)[: int(random.integers(1, 12))] for _ in range(15)]
    teacher = Teacher.of(histories, 12, [(1.0, shared_users(histories, 12))], keep=12, weight=0.5)
    for user, history in enumerate(histories):
        for position in range(1, len(history)):
            row = teacher.first[user] + position - 1
            told = zip(teacher.items[row], teacher.shares[row], strict=True)
            found = {int(item): float(share) for item, share in told if item >= 0}
            assert found == pytest.approx(users_by_hand([h.tolist() for h in histories], user, position))


def test_items_of_like_texts_speak_for_each_other() -> None:
    texts = ["red silk lipstick", "red silk lipstick set", "beard oil", "beard comb", "", "silk scarf"]
    votes = like_texts(texts)
    scores = votes.scores([np.array([0]), np.array([2]), np.array([4])])
    assert scores[0].argmax() == 1
    assert scores[1].argmax() == 3
    assert not scores[2].any()
    assert (votes.weights.diagonal() == 0).all()
    np.testing.assert_allclose(votes.weights.toarray(), votes.weights.toarray().T, atol=1e-6)


def test_a_part_that_knows_nothing_leaves_its_share_to_the_others() -> None:
    histories = [np.array([0, 1, 2]), np.array([0, 1, 3])]
    silent = like_texts([""] * 4)
    alone, beside = (
        Teacher.of(histories, 4, votes, keep=4, weight=0.5)
        for votes in (
            [(0.2, sequential_rules(histories, 4))],
            [(0.2, sequential_rules(histories, 4)), (0.8, silent)],
        )
    )
    assert (alone.items == beside.items).all()
    np.testing.assert_allclose(alone.shares, beside.shares)


def test_the_soft_loss_is_the_cross_entropy_over_items_on_average(
    codec: ScidCodec, tokens: PromptTokens
) -> None:
    """-sum_j q(j) log pi(j): exactly over all candidates, and as trained, averaged over the draws of y."""
    histories = rows_of(codec, [5, 6, 7, 8, 9] * 6)
    teacher = rules_teacher(histories, len(codec), keep=6, weight=0.7)
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
    teacher = rules_teacher(histories, len(codec), keep=4, weight=0.9)
    windows, model = windows_of(histories), model_for(codec)
    taught, plain = (
        accumulate(model, windows, token_map(tokens), QUICK, np.random.default_rng(0), "cpu", None, one)[0]
        for one in (teacher, None)
    )
    assert taught == pytest.approx(plain, abs=1e-6)


def test_a_taught_step_may_be_split(codec: ScidCodec, tokens: PromptTokens) -> None:
    histories = rows_of(codec, [5, 6, 7, 8, 9] * 6)
    teacher = rules_teacher(histories, len(codec), keep=6, weight=0.5)
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
    every = TeacherShares(sasrec=0.4, rules=0.2, users=0.2, texts=0.2)
    sasrec = SasRecSettings(dimension=8, epochs=2)
    wanted = QUICK.model_copy(update={"teacher_weight": 0.5, "teacher": every, "sasrec": sasrec})
    asked: list[str] = []

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    def run(name: str, progress: Callable[[Step], None] | None = None, keep: str = "kept") -> SftReport:
        return train_sft(
            codec_dir, small_world.histories(24), wanted, tmp_path / name,
            checkpoint=tmp_path / keep, progress=progress, preparing=lambda what, *_: asked.append(what),
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run("policy", killed)
    assert set(asked) == {"SASRec", "teacher"}
    asked.clear()
    report = run("policy")
    assert not asked  # the teacher was kept
    assert report.losses[-1] < report.losses[0]
    assert run("uninterrupted", keep="elsewhere").losses == report.losses
    assert not list((tmp_path / "kept").iterdir())
