"""The inference half of the tokenizer: text in, codes out, the same after a save, unique when placed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from policies.codec import ScidCodec
from policies.errors import CodecError, PolicyRefused
from policies.quantizer import ItemEncoder, Quantizer, SentenceEncoder, TfidfEncoder, directory_hash

WORDS = ["red", "blue", "lamp", "chair", "song", "film", "book", "light", "night", "game", "café", "x1"]


def texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 12))).title() for _ in range(count)]


def fitted(ngrams: int = 1) -> tuple[TfidfVectorizer, TruncatedSVD, TfidfEncoder]:
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, ngrams))
    svd = TruncatedSVD(n_components=6, random_state=0)
    svd.fit(vectorizer.fit_transform(texts(80)))
    vocabulary = {term: int(row) for term, row in vectorizer.vocabulary_.items()}
    encoder = TfidfEncoder(
        vocabulary,
        vectorizer.idf_.astype(np.float32),
        np.ascontiguousarray(svd.components_.T, dtype=np.float32),
        ngrams,
    )
    return vectorizer, svd, encoder


def quantizer(text_width: int = 6, collaborative: int = 4, seed: int = 0) -> Quantizer:
    draw = np.random.default_rng(seed)
    width, hidden, latent = text_width + collaborative, 16, 5

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    return Quantizer(
        codebooks=(normal(4, latent), 0.5 * normal(4, latent), 0.25 * normal(4, latent)),
        mean=normal(width),
        scale=1 + np.abs(normal(width)),
        weights=(normal(width, hidden), normal(hidden, latent)),
        biases=(normal(hidden), normal(latent)),
        text_width=text_width,
        bridge=normal(text_width + 1, collaborative),
    )


@pytest.mark.parametrize("ngrams", [1, 2])
def test_text_vectors_equal_those_of_scikit_learn(ngrams: int) -> None:
    vectorizer, svd, encoder = fitted(ngrams)
    several = [*texts(40, seed=1), "", "unknown words only"]
    theirs = normalize(svd.transform(vectorizer.transform(several)))
    # fp32 against fp64.
    np.testing.assert_allclose(encoder.encode(several), theirs, atol=1e-5)
    assert encoder.encode([]).shape == (0, 6)
    assert not encoder.encode(["unknown"]).any()


def test_a_text_has_the_same_vector_alone_and_among_others() -> None:
    encoder = fitted(2)[2]
    several = [*texts(600, seed=6), "", "unknown", *texts(3, seed=7)]
    alone = np.concatenate([encoder.encode([text]) for text in several])
    np.testing.assert_array_equal(encoder.encode(several), alone)


def test_a_stream_gives_the_codes_of_all_texts_and_asks_for_no_more_than_a_chunk() -> None:
    encoder = ItemEncoder(fitted()[2], quantizer())
    asked: list[int] = []

    def endless() -> Iterator[str]:
        for number, text in enumerate(texts(100, seed=8)):
            asked.append(number)
            yield text

    stream = encoder.stream(endless(), chunk=7)
    first = next(stream)
    assert len(asked) == 7
    found = np.concatenate([first, *stream])
    assert found.tolist() == encoder.encode(texts(100, seed=8)).tolist()
    assert list(encoder.stream([])) == []


def test_a_text_of_a_megabyte_is_read_to_its_limit() -> None:
    encoder = fitted()[2]
    long = encoder.encode([("red lamp " * 120_000)])
    np.testing.assert_allclose(long, encoder.encode(["red lamp " * 2_000]), atol=1e-2)
    assert np.linalg.norm(long) == pytest.approx(1, abs=1e-5)


def test_codes_are_the_nearest_of_what_is_left_as_torch_computes_it() -> None:
    import torch

    rq = quantizer()
    vectors = np.random.default_rng(3).normal(size=(50, 10)).astype(np.float32)
    with torch.no_grad():
        first, second = torch.nn.Linear(10, 16), torch.nn.Linear(16, 5)
        for layer, weight, bias in zip((first, second), rq.weights, rq.biases, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias))
        scaled = (torch.from_numpy(vectors) - torch.from_numpy(rq.mean)) / torch.from_numpy(rq.scale)
        residual = second(torch.relu(first(scaled)))
        expected = []
        for book in map(torch.from_numpy, rq.codebooks):
            nearest = torch.cdist(residual, book).argmin(dim=1)
            residual = residual - book[nearest]
            expected.append(nearest)
    assert rq.encode(vectors, chunk=7).tolist() == torch.stack(expected, dim=1).tolist()
    assert rq.sizes == (4, 4, 4)


def test_an_item_encoder_is_the_same_after_a_save(tmp_path: Path) -> None:
    encoder = ItemEncoder(fitted(2)[2], quantizer())
    digest = encoder.save(tmp_path / "quantizer")
    back = ItemEncoder.load(tmp_path / "quantizer")
    several = texts(30, seed=2)
    assert back.encode(several).tolist() == encoder.encode(several).tolist()
    assert digest == directory_hash(tmp_path / "quantizer")
    assert encoder.save(tmp_path / "again") == digest
    (tmp_path / "quantizer" / "quantizer.safetensors").unlink()
    with pytest.raises(CodecError, match="cannot be read"):
        ItemEncoder.load(tmp_path / "quantizer")


def test_new_items_get_free_codes_near_their_text_and_a_full_codec_says_so(tmp_path: Path) -> None:
    encoder = ItemEncoder(fitted()[2], quantizer())
    digest = encoder.save(tmp_path / "codec" / "quantizer")
    taken = np.array([[a, b, c] for a in range(3) for b in range(4) for c in range(4)])
    names = [f"old-{row}" for row in range(len(taken))]
    ScidCodec(names, taken, (4, 4, 4), quantizer_hash=digest).save(tmp_path / "codec")
    codec = ScidCodec.load(tmp_path / "codec")
    longer = codec.place([f"new-{n}" for n in range(16)], texts(16, seed=4))
    assert len(longer) == 64
    assert longer.item_ids[:48] == codec.item_ids
    with pytest.raises(CodecError, match="every SCID is taken"):
        longer.place(["one-too-many"], ["red lamp"])


def test_a_codec_grows_by_the_items_that_are_new_and_have_text(tmp_path: Path) -> None:
    digest = ItemEncoder(fitted()[2], quantizer()).save(tmp_path / "quantizer")
    ScidCodec(["a"], np.array([[0, 0, 0]]), (4, 4, 4), quantizer_hash=digest).save(tmp_path)
    codec = ScidCodec.load(tmp_path)
    longer = codec.grow({"a": "red lamp", "b": "blue chair", "c": "  ", "d": "song"})
    assert longer.item_ids == ("a", "b", "d")
    assert longer.grow({"a": "anything", "c": ""}) is longer
    longer.save(tmp_path / "copy")
    assert len(ScidCodec.load(tmp_path / "copy").grow({"e": "film"})) == 4


def test_a_placed_item_keeps_its_nearest_code_when_it_is_free() -> None:
    encoder = ItemEncoder(fitted()[2], quantizer())
    for text in texts(20, seed=5):
        free = encoder.place([text], (4, 4, 4), np.empty((0, 3), np.int32))
        assert free.tolist() == encoder.encode([text]).tolist()
        twice = encoder.place([text, text], (4, 4, 4), np.empty((0, 3), np.int32))
        assert twice[0].tolist() == free[0].tolist()
        assert twice[0].tolist() != twice[1].tolist()
        assert twice[0][:2].tolist() == twice[1][:2].tolist()
        deeper = encoder.place([text, text], (4, 4, 4, 2), np.empty((0, 4), np.int32))
        assert deeper.tolist() == [[*free[0].tolist(), 0], [*free[0].tolist(), 1]]


def test_vectors_of_the_wrong_width_or_with_nan_are_refused() -> None:
    rq = quantizer()
    with pytest.raises(CodecError, match=r"takes \[n, 10\]"):
        rq.encode(np.zeros((2, 9), np.float32))
    with pytest.raises(CodecError, match="not a number"):
        rq.encode(np.full((2, 10), np.nan, np.float32))


def test_a_changed_quantizer_under_a_codec_is_refused(tmp_path: Path) -> None:
    digest = ItemEncoder(fitted()[2], quantizer()).save(tmp_path / "codec" / "quantizer")
    codec = ScidCodec(["a"], np.array([[0, 0, 0]]), (4, 4, 4), quantizer_hash=digest)
    codec.save(tmp_path / "codec")
    assert ScidCodec.load(tmp_path / "codec").encoder().quantizer.sizes == (4, 4, 4)
    quantizer(seed=1).save(tmp_path / "codec" / "quantizer")
    with pytest.raises(PolicyRefused, match="the quantizer is not the one"):
        ScidCodec.load(tmp_path / "codec")


def test_a_copied_codec_takes_its_quantizer_along(tmp_path: Path) -> None:
    digest = ItemEncoder(fitted()[2], quantizer()).save(tmp_path / "codec" / "quantizer")
    ScidCodec(["a"], np.array([[0, 0, 0]]), (4, 4, 4), quantizer_hash=digest).save(tmp_path / "codec")
    ScidCodec.load(tmp_path / "codec").save(tmp_path / "copy")
    copied = ScidCodec.load(tmp_path / "copy")
    assert copied.quantizer_hash == digest
    assert len(copied.place(["b"], ["red lamp"])) == 2


def test_a_sentence_encoder_that_moved_or_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    encoder = SentenceEncoder(tmp_path / "model", directory_hash(tmp_path / "model"), 384)
    encoder.save(tmp_path / "saved")
    (tmp_path / "model" / "config.json").write_text("{ }")
    with pytest.raises(CodecError, match="changed since the codec was fitted"):
        encoder.encode(["red"])
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model").rmdir()
    with pytest.raises(CodecError, match="is gone"):
        encoder.encode(["red"])
