"""Alignment of users and items: the printed loss, nothing from what is held out, and resumed = whole."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.codec import ScidCodec
from policies.users import ItemVectors, pooled
from tests.trainer import small_world
from tests.trainer.test_tokenization import QUICK
from trainer.checkpoint import Checkpoint
from trainer.settings import TokenizationSettings
from trainer.tokenization import TokenizationReport, fit_codec
from trainer.tokenization.alignment import Watch, u2i_loss
from trainer.tokenization.din import Din, DinTraining, din_loss, one_pair_a_user, train_din
from trainer.tokenization.interactions import Interactions, batches
from trainer.tokenization.rqvae import RqVaeFit, RqVaeShape, RqVaeTraining

DIN = DinTraining(dimension=8, attention=6, epochs=4, batch=32, negatives=12, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows() -> list[npt.NDArray[np.int64]]:
    return [
        np.array([int(item[5:]) for item in history], dtype=np.int64) for history in small_world.histories()
    ]


def a_table(users: int, items: int, seed: int) -> list[npt.NDArray[np.int64]]:
    random = np.random.default_rng(seed)
    return [random.integers(items, size=random.integers(0, 9)) for _ in range(users)]


# The loss


@pytest.mark.parametrize("log_q", [False, True])
def test_u2i_is_the_printed_formula(log_q: bool) -> None:
    torch.manual_seed(0)
    users, items = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    met = torch.rand(9, 9) < 0.3
    share = torch.rand(9) + 0.01
    loss = u2i_loss(users, items, met, share.log() if log_q else None)
    gradients = torch.autograd.grad(loss, [users, items])

    u, v = (part.detach().double().requires_grad_() for part in (users, items))
    total = torch.zeros((), dtype=torch.float64)
    for b in range(9):
        score = [u[b] @ v[j] - (math.log(share[j]) if log_q else 0.0) for j in range(9)]
        others = sum(score[j].exp() for j in range(9) if j != b and not met[b, j])
        total = total - (score[b].exp() / (score[b].exp() + others)).log()
    assert loss.item() == pytest.approx((total / 9).item(), abs=1e-6)
    for mine, exact in zip(gradients, torch.autograd.grad(total / 9, [u, v]), strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-6, rtol=0)


def test_a_user_who_met_everything_has_no_negatives_and_no_loss() -> None:
    users, items = torch.randn(4, 3), torch.randn(4, 3)
    assert u2i_loss(users, items, torch.ones(4, 4, dtype=torch.bool)).item() == 0.0


# Who met what


@settings(max_examples=60, deadline=None)
@given(users=st.integers(1, 12), items=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_met_is_what_a_loop_would_say(users: int, items: int, seed: int) -> None:
    histories = a_table(users, items, seed)
    found = Interactions.of(histories, items, seed=seed)
    random = np.random.default_rng(seed + 1)
    some, columns = random.integers(users, size=7), random.integers(items, size=11)
    expected = [[column in histories[user].tolist() for column in columns] for user in some]
    np.testing.assert_array_equal(found.met(some, columns), expected)


@settings(max_examples=60, deadline=None)
@given(users=st.integers(1, 12), items=st.integers(1, 9), seed=st.integers(0, 2**16))
def test_pairs_are_all_positions_but_the_first_and_the_held_out(users: int, items: int, seed: int) -> None:
    histories = a_table(users, items, seed)
    found = Interactions.of(histories, items, seed=seed)
    assert len(found.pairs) == sum(max(len(history) - 1, 0) for history in histories) - len(found.watched)
    for place in [*found.pairs, *found.watched]:
        user = found.owner[place]
        at = place - found.starts[user]
        past = found.before(np.array([place]))[0]
        assert past[past >= 0].tolist() == histories[user][max(at - 20, 0) : at].tolist()
        assert (place in found.watched) <= (at == len(histories[user]) - 1)
    shown = found.shown()
    assert sum(map(len, shown)) == len(found.flat) - len(found.watched)
    assert found.shares.sum() == pytest.approx(1.0 if len(found.pairs) else 0.0)
    drawn = one_pair_a_user(found, np.random.default_rng(seed)) if len(found.pairs) else []
    assert sorted({int(found.owner[place]) for place in found.pairs}) == [found.owner[p] for p in drawn]


@given(n=st.integers(1, 50), size=st.integers(2, 9), epoch=st.integers(0, 3))
def test_batches_hold_every_pair_once_and_never_a_single_one(n: int, size: int, epoch: int) -> None:
    cut = batches(n, size, seed=1, epoch=epoch)
    assert sorted(np.concatenate(cut).tolist()) == list(range(n))
    assert n == 1 or min(map(len, cut)) > 1


def test_watched_pairs_are_scored_against_items_never_met() -> None:
    interactions = Interactions.of(rows(), 60, seed=0)
    watch = Watch(interactions, seed=0)
    items = torch.eye(60)
    knows = torch.zeros(len(watch), 60).scatter_(1, torch.from_numpy(watch.positive)[:, None], 1.0)
    assert watch.measure(knows, items).as_dict() == {"auc": 1.0, "recall_at_10": 1.0}
    assert watch.measure(torch.zeros(len(watch), 60), items).auc == 0.5
    assert watch.measure(-knows, items).as_dict() == {"auc": 0.0, "recall_at_10": 0.0}


# DIN


def test_din_scores_shared_and_own_candidates_alike() -> None:
    torch.manual_seed(0)
    model = Din(20, DIN).double()
    past = torch.tensor([[1, 2, 3], [4, -1, -1], [5, 6, -1]])
    candidate = torch.tensor([7, 7, 7])
    logits = model(past, candidate, torch.tensor([7, 8]))
    torch.testing.assert_close(logits[:, 0], logits[:, 1])
    longer = torch.cat([past, torch.full((3, 4), -1)], dim=1)
    torch.testing.assert_close(model(longer, candidate, torch.tensor([7, 8])), logits)


def test_what_is_deployed_pools_as_din_was_trained() -> None:
    interactions = Interactions.of(rows(), 60, seed=0)
    found = train_din(interactions, DIN, seed=0)
    torch.manual_seed(0)
    assert found.attention is not None
    history = np.array([[3, 9, 15, -1]])
    vectors = ItemVectors(np.zeros((60, 0), np.float32), found.items)
    expected = np.zeros(8)
    for h in (3, 9, 15):
        joined = np.concatenate([found.items[h], found.items[15], found.items[h] * found.items[15]])
        hidden = np.maximum(joined @ found.attention.hidden + found.attention.bias, 0)
        expected += (hidden @ found.attention.out + found.attention.offset[0]) * found.items[h]
    np.testing.assert_allclose(pooled(vectors, found.attention, history)[0], expected, atol=1e-5)


def test_negatives_that_a_user_met_count_for_nothing() -> None:
    logits = torch.tensor([[0.0, 100.0, 1.0]])
    barred = torch.tensor([[True, False]])
    assert din_loss(logits, barred).item() == pytest.approx(math.log(1 + math.e), abs=1e-6)


def test_din_brings_items_of_a_topic_together() -> None:
    found = train_din(Interactions.of(rows(), 60, seed=0), replace(DIN, epochs=30), seed=0)
    alike = found.items @ found.items.T
    topic = np.arange(60) % small_world.TOPICS
    same = topic[:, None] == topic[None, :]
    assert alike[same & ~np.eye(60, dtype=bool)].mean() > alike[~same].mean() + 0.3
    assert found.losses[-1] < found.losses[0]


class KilledHereError(Exception):
    pass


@pytest.mark.parametrize("kill_at", [("behaviour", 2), ("alignment", 3), ("codes", 18), ("codes", 60)])
def test_a_resumed_fit_equals_an_uninterrupted_one(kill_at: tuple[str, int], tmp_path: Path) -> None:
    given_ = (small_world.items(), small_world.histories())
    settings = QUICK.model_copy(update={"codebooks": "moving"})
    whole = fit_codec(*given_, settings, tmp_path / "whole", checkpoint=tmp_path / "kept")
    seen: list[tuple[str, int]] = []

    def kill(what: str, done: int, _of: int) -> None:
        seen.append((what, done))
        if (what, done) >= kill_at and what == kill_at[0]:
            raise KilledHereError

    with pytest.raises(KilledHereError):
        fit_codec(*given_, settings, tmp_path / "codec", checkpoint=tmp_path / "state", progress=kill)
    after: list[tuple[str, int]] = []
    resumed = fit_codec(
        *given_,
        settings,
        tmp_path / "codec",
        checkpoint=tmp_path / "state",
        progress=lambda what, done, _: after.append((what, done)),
    )
    assert (resumed.item_map_hash, resumed.quantizer_hash) == (whole.item_map_hash, whole.quantizer_hash)
    assert resumed.auc == whole.auc
    # Of what was done before the kill, at most the step it fell into is done again.
    assert len([step for step in after if step in seen and step[1] > 0]) <= 1
    assert not list((tmp_path / "state").glob("*/state.pt"))


def test_a_checkpoint_of_another_fit_is_not_continued(tmp_path: Path) -> None:
    one, other = Checkpoint(tmp_path / "c", "one"), Checkpoint(tmp_path / "c", "other")
    one.save({"step": 3}, {"weights": torch.ones(2)})
    kept = one.load()
    assert kept is not None
    assert kept.facts == {"step": 3}
    assert other.load() is None


# The whole


@pytest.fixture(scope="module")
def dual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TokenizationReport]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("codec") / "codec"
    # Random encoders tell topics apart by chance: of five seeds an AUC of .30 (this one) to .82 (seed 0).
    return out, fit_codec(small_world.items(), small_world.histories(), QUICK, out, seed=2)


def test_validation_and_test_interactions_in_the_input_change_no_code(tmp_path: Path) -> None:
    whole = small_world.histories()
    one = fit_codec(small_world.items(), whole, QUICK, tmp_path / "one", leave_out=2)
    two = fit_codec(small_world.items(), [history[:-2] for history in whole], QUICK, tmp_path / "two")
    assert one.quantizer_hash == two.quantizer_hash
    codecs = [ScidCodec.load(tmp_path / name) for name in ("one", "two")]
    np.testing.assert_array_equal(codecs[0].codes, codecs[1].codes)
    np.testing.assert_array_equal(*[codec.encode_users(whole) for codec in codecs])


def test_alignment_tells_held_out_pairs_from_others(dual: tuple[Path, TokenizationReport]) -> None:
    _, report = dual
    assert report.aligned
    # Users stay in one topic of six: knowing it is worth an AUC of about .9.
    assert report.auc["end"] > 0.8 > report.auc["start"] + 0.1
    assert report.auc["best"] >= max(report.auc.values())
    assert 1 <= (report.switched_at or 0) <= QUICK.alignment.epochs


def test_users_of_a_topic_share_first_codes(dual: tuple[Path, TokenizationReport]) -> None:
    codec = ScidCodec.load(dual[0])
    codes = codec.encode_users(small_world.histories())
    topic = np.arange(90) % small_world.TOPICS
    same_code = (codes[:, None, 0] == codes[None, :, 0]) & ~np.eye(90, dtype=bool)
    same_topic = topic[:, None] == topic[None, :]
    assert same_topic[same_code].mean() > 0.6  # one pair in six by chance


def test_a_user_without_a_known_item_has_an_scid_too(dual: tuple[Path, TokenizationReport]) -> None:
    codec = ScidCodec.load(dual[0])
    codes = codec.encode_users([[], ["nothing-we-know"], ["item-001"]])
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes >= 0).all()
    assert (codes < np.array(codec.user_sizes)).all()


@pytest.mark.parametrize(
    "update",
    [
        {"users": False},
        {"alignment": QUICK.alignment.model_copy(update={"method": "none"})},
        {"collaborative": QUICK.collaborative.model_copy(update={"method": "none"})},
        {"collaborative": QUICK.collaborative.model_copy(update={"method": "ppmi"})},
        {"method": "rqkmeans"},
        {"codebooks": "moving"},
    ],
    ids=str,
)
def test_every_combination_of_parts_gives_a_codec(update: dict[str, object], tmp_path: Path) -> None:
    settings: TokenizationSettings = QUICK.model_copy(update=update)
    report = fit_codec(small_world.items(), small_world.histories(), settings, tmp_path / "codec")
    codec = ScidCodec.load(tmp_path / "codec")
    assert bool(codec.user_sizes) == settings.users
    assert report.aligned == (settings.alignment.method == "u2i")
    assert codec.encode_users(small_world.histories()).shape == (90, len(codec.user_sizes))
    longer = codec.place(["new"], ["lamp number 99"])
    assert longer.encode_users([["new"]]).shape == (1, len(codec.user_sizes))


def test_too_few_pairs_align_nothing_and_the_report_says_so(tmp_path: Path) -> None:
    report = fit_codec(small_world.items(), small_world.histories(8), QUICK, tmp_path / "codec")
    assert (report.aligned, report.users, report.user_sizes) == (False, 0, ())
    assert 0 < report.pairs < QUICK.alignment.min_pairs


def test_moving_means_are_the_means_of_what_they_stand_for() -> None:
    shape = RqVaeShape(input_dim=4, hidden=(), code_dim=2, levels=1, codes=3)
    training = RqVaeTraining(
        steps=400, batch=64, learning_rate=0.0, commitment=0.25, warm_up_steps=0, revive_every=10**9,
        polish_iterations=0, decay=0.9,
    )  # fmt: skip
    fit = RqVaeFit(shape, training, seed=0, device=torch.device("cpu"))
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    for step in range(400):
        fit.loss(step, x, lambda: x)
        fit.after(step)
    z = fit.model.encoder(x).detach()
    quantized = fit.model.quantize(z, 0.25)
    for code in quantized.codes[:, 0].unique():
        mean = z[quantized.codes[:, 0] == code].mean(0)
        torch.testing.assert_close(fit.model.codebooks[0, code].detach(), mean, atol=1e-4, rtol=0)
