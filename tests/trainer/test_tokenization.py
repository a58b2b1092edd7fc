"""Codecs: every SCID unique, the same input the same codes, nothing seen that was not given."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.codec import ScidCodec
from policies.errors import CodecError
from tests.trainer import small_world
from trainer.errors import CannotTrain, MissingText
from trainer.settings import AlignmentSettings, CollaborativeSettings, TokenizationSettings
from trainer.tokenization import codes_for, fit_codec
from trainer.tokenization.collaborative import collaborative_embeddings, cooccurrences, directed_cooccurrences
from trainer.tokenization.rqvae import RqVae, RqVaeShape, kmeans, nearest
from trainer.tokenization.text import fit_tfidf, item_texts
from trainer.tokenization.unique import collision_rate, unique_codes

QUICK = TokenizationSettings(
    hidden=(32,),
    code_dimension=8,
    steps=60,
    batch_size=64,
    text_dimension=12,
    collaborative=CollaborativeSettings(dimension=12, attention=8, epochs=12, batch_size=32, negatives=16),
    alignment=AlignmentSettings(hidden=(32,), dimension=16, epochs=20, batch_size=32),
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# Unique assignment


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60), levels=st.integers(1, 3), size=st.integers(2, 8), seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 1.0]),
)  # fmt: skip
def test_scids_are_unique_whatever_the_collisions(
    n: int, levels: int, size: int, seed: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    # Few different codes, so that most items collide and some prefixes hold more items than codes.
    codes = random.integers(0, max(1, size // 2), (n, levels)).astype(np.int32)
    residuals = (spread * random.normal(size=(n, 4))).astype(np.float32)
    book = random.normal(size=(size, 4)).astype(np.float32)
    found = unique_codes(codes, residuals, book)
    assert len(np.unique(found.codes, axis=0)) == n
    assert (found.codes >= 0).all()
    assert (found.codes < np.array(found.sizes)).all()
    np.testing.assert_array_equal(found.codes[:, : levels - 1], codes[:, :-1])
    _, counts = np.unique(codes[:, :-1], axis=0, return_counts=True)
    assert (len(found.sizes) == levels + 1) == (counts.max() > size)


def test_items_that_do_not_collide_keep_their_codes() -> None:
    codes = np.array([[0, 0], [0, 1], [1, 2]], dtype=np.int32)
    found = unique_codes(codes, np.zeros((3, 2), np.float32), np.eye(3, 2, dtype=np.float32))
    np.testing.assert_array_equal(found.codes, codes)
    assert (found.moved, found.collision_rate) == (0, 0.0)


def test_the_assignment_is_the_cheapest() -> None:
    # Both nearest to code 0; moving the first to code 1 costs 1, the second 9.
    book = np.array([[0.0], [2.0]], dtype=np.float32)
    codes = np.array([[0, 0], [0, 0]], dtype=np.int32)
    found = unique_codes(codes, np.array([[0.9], [-0.5]], np.float32), book)
    np.testing.assert_array_equal(found.codes, [[0, 1], [0, 0]])
    assert found.collision_rate == 1.0


# Behaviour


def test_cooccurrences_count_one_over_distance() -> None:
    counts = directed_cooccurrences([np.array([0, 1, 2])], 3, window=2).toarray()
    np.testing.assert_allclose(counts, [[0, 1, 0.5], [0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(cooccurrences([np.array([0, 1, 2])], 3, window=1).toarray()[1], [1, 0, 1])


def test_items_met_together_lie_together_and_unmet_ones_are_zero() -> None:
    rows = [np.array([int(item[5:]) for item in history]) for history in small_world.histories()]
    vectors = collaborative_embeddings(rows, 61, dimension=16)
    assert np.all(vectors[60] == 0)
    same = vectors[:60:6] @ vectors[:60:6].T
    other = vectors[:60:6] @ vectors[1:60:6].T
    assert same.mean() > 0.5 > other.mean() + 0.3
    np.testing.assert_array_equal(vectors, collaborative_embeddings(rows, 61, dimension=16))


def test_no_behaviour_gives_zero_vectors() -> None:
    assert not collaborative_embeddings([np.array([0])], 3, dimension=4).any()


# Text


def test_tfidf_equals_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = item_texts(small_world.items())
    encoder = fit_tfidf(texts, dimension=8, vocabulary=500, ngrams=2)
    theirs = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    matrix = theirs.fit_transform(texts).toarray()
    order = [theirs.vocabulary_[word] for word in encoder.vocabulary]
    projected = matrix[:, order] @ encoder.components
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(texts), projected, atol=1e-5)


def test_item_texts_join_what_is_there() -> None:
    table = pa.table({"item_id": ["a", "b"], "title": ["Lamp", None], "categories": [["x", "y"], None]})
    assert item_texts(table) == ["Lamp. x, y", ""]


# RQ-VAE


def test_gradients_pass_straight_through_the_codes() -> None:
    torch.manual_seed(0)
    model = RqVae(RqVaeShape(input_dim=6, hidden=(8,), code_dim=4, levels=2, codes=5))
    with torch.no_grad():
        model.codebooks.normal_()
    z = torch.randn(7, 4, requires_grad=True)
    quantized = model.quantize(z, 0.25)
    straight = z + (quantized.total - z).detach()
    torch.testing.assert_close(straight, quantized.total)
    (gradient,) = torch.autograd.grad(straight.square().sum(), z)
    torch.testing.assert_close(gradient, 2 * quantized.total.detach())


def test_codebook_and_commitment_terms_are_the_printed_ones() -> None:
    torch.manual_seed(0)
    model = RqVae(RqVaeShape(input_dim=6, hidden=(), code_dim=4, levels=2, codes=5)).double()
    with torch.no_grad():
        model.codebooks.normal_()
    z = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    quantized = model.quantize(z, 0.25)
    residual, expected = z.detach().numpy(), 0.0
    for level in range(2):
        book = model.codebooks[level].detach().numpy()
        chosen = ((residual[:, None] - book) ** 2).sum(-1).argmin(1)
        np.testing.assert_array_equal(chosen, quantized.codes[:, level].numpy())
        expected += 1.25 * ((residual - book[chosen]) ** 2).mean()
        residual = residual - book[chosen]
    assert quantized.loss.item() == pytest.approx(expected, abs=1e-12)


def test_kmeans_uses_every_centre_also_with_fewer_points_than_centres() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 3, generator=generator)
    assert len(nearest(points, kmeans(points, 16, generator)).unique()) == 16
    few = kmeans(points[:2], 4, generator)
    assert len(few.unique(dim=0)) == 4


# The whole codec


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("codec") / "codec"
    fit_codec(small_world.items(), small_world.histories(), QUICK, out)
    return out


def test_a_codec_is_unique_complete_and_reports_itself(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    report = fit_codec(
        small_world.items(), small_world.histories(), QUICK, tmp_path / "codec",
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    codec = ScidCodec.load(tmp_path / "codec")
    assert len(codec) == report.items == 60
    assert codec.sizes == report.sizes == (16, 16, 16)
    assert collision_rate(codec.codes) == 0.0
    assert report.text_encoder == "tfidf-svd"
    assert report.items_without_behaviour == report.items_without_text == 0
    assert steps[-1] == ("codes", 60, 60)
    assert {what for what, _, _ in steps} == {"text", "behaviour", "alignment", "codes"}
    assert codec.user_sizes == report.user_sizes == (32, 32, 32)
    assert report.users == 90
    assert min(report.perplexity) > 4
    assert (report.quantizer_hash, report.item_map_hash) == (codec.quantizer_hash, codec.item_map_hash)


def test_items_of_a_topic_share_first_codes(fitted: Path) -> None:
    codec = ScidCodec.load(fitted)
    topic = np.arange(60) % small_world.TOPICS
    same_code = codec.codes[:, None, 0] == codec.codes[None, :, 0]
    np.fill_diagonal(same_code, False)
    same_topic = topic[:, None] == topic[None, :]
    # By chance one pair in six is of one topic; the margin is wide, the seed fixed.
    assert same_topic[same_code].mean() > 0.8


@pytest.mark.parametrize("method", ["rqvae", "rqkmeans"])
def test_the_same_input_gives_the_same_codec(method: str, tmp_path: Path) -> None:
    wanted = QUICK.model_copy(update={"method": method})
    reports = [
        fit_codec(small_world.items(), small_world.histories(), wanted, tmp_path / name, seed=3)
        for name in ("one", "two")
    ]
    assert reports[0].item_map_hash == reports[1].item_map_hash
    assert reports[0].quantizer_hash == reports[1].quantizer_hash


def test_another_seed_gives_another_codec(fitted: Path, tmp_path: Path) -> None:
    report = fit_codec(small_world.items(), small_world.histories(), QUICK, tmp_path / "codec", seed=1)
    assert report.item_map_hash != ScidCodec.load(fitted).item_map_hash


def test_a_new_item_of_a_known_topic_lands_among_its_own(fitted: Path) -> None:
    codec = ScidCodec.load(fitted)
    texts = [f"{word} number 99. {word}. a fine {word} of make 1" for word in small_world.WORDS]
    longer = codec.place([f"new-{word}" for word in small_world.WORDS], texts)
    assert len(longer) == 66
    first = codec.codes[:, 0]
    at_home = sum(
        longer.encode(f"new-{word}")[0] in set(first[topic :: small_world.TOPICS].tolist())
        for topic, word in enumerate(small_world.WORDS)
    )
    assert at_home >= 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_catalogue_of_three_items_has_a_codec(count: int, tmp_path: Path) -> None:
    report = fit_codec(small_world.items(count), [["item-000", "item-001"]], QUICK, tmp_path / "codec")
    assert len(ScidCodec.load(tmp_path / "codec")) == count
    assert report.items == count


def test_items_that_nothing_tells_apart_get_a_further_level(tmp_path: Path) -> None:
    same = pa.table({"item_id": [f"i{n}" for n in range(20)], "title": ["the same"] * 20})
    report = fit_codec(same, [], QUICK.model_copy(update={"codes": 4}), tmp_path / "codec")
    codec = ScidCodec.load(tmp_path / "codec")
    assert collision_rate(codec.codes) == 0.0
    assert codec.levels == 4
    assert report.collision_rate > 0


def test_an_item_without_text_is_refused_and_named(tmp_path: Path) -> None:
    table = pa.table({"item_id": ["a", "b"], "title": ["lamp", " "]})
    with pytest.raises(MissingText, match=r"'b'.*without_text"):
        fit_codec(table, [], QUICK, tmp_path / "codec")
    assert not (tmp_path / "codec").exists()
    allowed = QUICK.model_copy(update={"without_text": "allow"})
    assert fit_codec(table, [["a", "b"]], allowed, tmp_path / "codec").items_without_text == 1


def test_an_empty_catalogue_and_repeated_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotTrain, match="catalogue is empty"):
        fit_codec(pa.table({"item_id": pa.array([], pa.string())}), [], QUICK, tmp_path / "codec")
    with pytest.raises(CodecError, match="twice"):
        fit_codec(pa.table({"item_id": ["a", "a"], "title": ["x", "y"]}), [], QUICK, tmp_path / "codec")


def test_a_configured_encoder_is_never_replaced_silently(tmp_path: Path) -> None:
    missing = QUICK.model_copy(update={"text_encoder": tmp_path / "no-such-model"})
    with pytest.raises(CodecError):
        fit_codec(small_world.items(), [], missing, tmp_path / "codec")


def test_what_the_histories_leave_out_changes_nothing(tmp_path: Path) -> None:
    """Leak-free: items outside the given histories cannot enter, since nothing else is read."""
    train = [history[:-1] for history in small_world.histories()]
    unknown = [[*history, "not-in-the-catalogue"] for history in train]
    one = fit_codec(small_world.items(), train, QUICK, tmp_path / "one")
    two = fit_codec(small_world.items(), unknown, QUICK, tmp_path / "two")
    assert one.item_map_hash == two.item_map_hash


@pytest.mark.parametrize(
    ("items", "codes"), [(3, 4), (60, 16), (2_000, 128), (4_096, 128), (4_097, 256), (10**6, 256)]
)
def test_the_rule_for_codebook_sizes(items: int, codes: int) -> None:
    assert codes_for(items, TokenizationSettings()) == codes
