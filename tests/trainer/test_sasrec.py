"""SASRec and its loss: equal to the plain computation, causal, reproducible, and a teacher of both halves."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trainer.errors import CannotTrain
from trainer.settings import SasRecSettings
from trainer.sft.catalogue_loss import catalogue_loss
from trainer.sft.sasrec import SEED_STRIDE, SasRec
from trainer.sft.teacher import Teacher
from trainer.sft.votes import sequential_rules

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = SasRecSettings(
    dimension=16, length=8, epochs=12, batch_targets=64, dropout=0.1, learning_rate=1e-2, held_out=0.0
)
CHAIN = [(np.arange(6) + start) % 12 for start in range(12)] * 4
"""After item i always comes i + 1."""


@pytest.fixture(scope="module")
def chain() -> SasRec:
    torch.set_num_threads(1)
    return SasRec.fit(CHAIN, 12, SMALL)


@pytest.mark.parametrize("rows", [1, 255, 600])
def test_the_catalogue_loss_is_cross_entropy_with_its_gradients(rows: int) -> None:
    torch.manual_seed(0)
    states = (8 * torch.randn(rows, 6)).requires_grad_()
    items = torch.randn(40, 6, requires_grad=True)
    targets = torch.randint(0, 40, (rows,))
    mine = catalogue_loss(states, items, targets)
    plain = F.cross_entropy(states.double() @ items.double().T, targets)
    torch.testing.assert_close(mine.double(), plain, atol=1e-5, rtol=1e-5)
    for one, other in zip(
        torch.autograd.grad(3 * mine, (states, items)),
        torch.autograd.grad(3 * plain, (states, items)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_it_learns_what_follows_what(chain: SasRec) -> None:
    found = chain.log_probs([np.array([3]), np.array([7, 8, 9])])
    assert found.argmax(axis=1).tolist() == [4, 10]
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1.0, atol=1e-5)


def test_a_history_is_scored_alike_alone_and_in_company(chain: SasRec) -> None:
    histories = [np.array([3]), np.arange(12), np.array([5, 6]), np.zeros(0, np.int64)]
    together = chain.log_probs(histories)
    for row, history in zip(together, histories, strict=True):
        np.testing.assert_allclose(chain.log_probs([history])[0], row, atol=1e-5)
    # Only the last ``length`` items are read; of no history every item is as likely.
    np.testing.assert_allclose(chain.log_probs([np.arange(12)[-8:]])[0], together[1], atol=1e-5)
    np.testing.assert_allclose(together[3], -np.log(12), atol=1e-5)


def test_same_input_and_seed_give_the_same_model(chain: SasRec) -> None:
    again = SasRec.fit(CHAIN, 12, SMALL)
    np.testing.assert_array_equal(again.log_probs(CHAIN[:4]), chain.log_probs(CHAIN[:4]))


def test_an_ensemble_averages_its_members_probabilities(chain: SasRec) -> None:
    short = SMALL.model_copy(update={"epochs": 3})
    both = SasRec.fit(CHAIN, 12, short.model_copy(update={"members": 2}))
    second = short.model_copy(update={"seed": SEED_STRIDE})
    each = [np.exp(SasRec.fit(CHAIN, 12, one).log_probs(CHAIN[:5])) for one in (short, second)]
    np.testing.assert_allclose(np.exp(both.log_probs(CHAIN[:5])), np.mean(each, axis=0), atol=1e-6)
    assert not np.allclose(each[0], each[1], atol=1e-3)


def test_it_keeps_the_weights_that_rank_held_out_items_best() -> None:
    seen: list[float] = []
    wanted = SMALL.model_copy(update={"held_out": 0.3, "patience": 2, "learning_rate": 3e-2, "epochs": 20})
    SasRec.fit(CHAIN, 12, wanted, progress=lambda epoch, epochs, loss, ndcg: seen.append(ndcg))
    assert max(seen) > 0.9
    assert seen.index(max(seen)) == len(seen) - 1 - 2


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(CannotTrain, match="no history has two items"):
        SasRec.fit([np.array([1])], 3, SMALL)


def test_rules_for_many_users_are_the_formula() -> None:
    rules = sequential_rules([np.array([0, 1, 2]), np.array([0, 2])], 4)
    # C[0,1] = 1, C[0,2] = 1/2 + 1, C[1,2] = 1; item 0 was met twice.
    damp = 2**-0.5
    expected = [[0, damp, 1.5 * damp, 0], [0, 0, 1 + 1.5 * damp / 2, 0], [0, 0, 0, 0]]
    found = rules.scores([np.array([0]), np.array([0, 1]), np.zeros(0, np.int64)])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_teacher_mixes_both_halves_without_what_was_met(chain: SasRec) -> None:
    sigma = 0.6
    rules = sequential_rules(CHAIN, 12)
    rules_alone = Teacher.of(CHAIN, 12, [(1.0, rules)], keep=12, weight=0.5)
    mixed = Teacher.of(CHAIN, 12, [(1 - sigma, rules), (sigma, chain)], keep=12, weight=0.5)
    sasrec_alone = Teacher.of(CHAIN, 12, [(1.0, chain)], keep=12, weight=0.5)
    history = CHAIN[0]
    for position in range(1, len(history)):
        row = int(mixed.first[0]) + position - 1
        told = np.exp(chain.log_probs([history[:position]])[0])
        told[history[:position]] = 0
        np.testing.assert_allclose(by_item(sasrec_alone, row), told / told.sum(), atol=1e-5)
        expected = sigma * told / told.sum()
        for item, share in zip(rules_alone.items[row], rules_alone.shares[row], strict=True):
            if item >= 0:
                expected[item] += (1 - sigma) * share
        np.testing.assert_allclose(by_item(mixed, row), expected / expected.sum(), atol=1e-5)


def by_item(teacher: Teacher, row: int) -> np.ndarray:
    """Its shares of one sample, of each of twelve items."""
    found, kept = np.zeros(12), teacher.items[row] >= 0
    found[teacher.items[row][kept]] = teacher.shares[row][kept]
    return found
