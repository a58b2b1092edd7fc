"""Text embeddings of items: which encoder, fitting it, and what it computed kept for the next time.

TF-IDF projected on its leading singular vectors is fitted here, in seconds and without a download; a local
sentence-transformers directory is only opened, and its vectors are cached by content. Which one was used is
written into the codec (``policies.text`` holds both at inference), and neither ever stands in for the other.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from policies.errors import CodecError
from policies.quantizer import SentenceEncoder, TextEncoder, TfidfEncoder, terms
from policies.text import MAX_TEXT
from trainer.errors import MissingText

from .svd import truncated_svd

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (texts done, texts in all)."""

CHUNK = 512
"""Texts embedded, and kept, at a time: what a kill can lose."""
_PARTIAL = ".partial"


def item_texts(items: pa.Table) -> list[str]:
    """One text an item, as ``features.catalogue.Item.words``: title, categories, text, joined by ". ".

    Of a table with ``item_id`` and any of these columns; missing columns and nulls count as empty.
    """
    columns = [
        items.column(name).to_pylist() if name in items.column_names else [None] * items.num_rows
        for name in ("title", "categories", "text")
    ]
    return [
        ". ".join(part for part in (title or "", ", ".join(categories or ()), text or "") if part.strip())
        for title, categories, text in zip(*columns, strict=True)
    ]


def require_text(item_ids: Sequence[str], texts: Sequence[str]) -> None:
    """Raises MissingText naming the first item whose text is empty."""
    empty = [item_id for item_id, text in zip(item_ids, texts, strict=True) if not text.strip()]
    if empty:
        raise MissingText(
            f"item {empty[0]!r} has no title, text or categories ({len(empty)} of {len(item_ids)} items); "
            "add text with `align3gr catalogue load`, or set trainer.tokenization.without_text to allow"
        )


def fit_text_encoder(
    texts: Sequence[str], *, directory: Path | None, dimension: int, vocabulary: int, ngrams: int
) -> TextEncoder:
    """The encoder of ``directory`` when one is configured, else TF-IDF + SVD fitted to ``texts``.

    Raises CodecError when a configured directory cannot be used: it is never replaced silently.
    """
    if directory is not None:
        return SentenceEncoder.open(directory)
    return fit_tfidf(texts, dimension=dimension, vocabulary=vocabulary, ngrams=ngrams)


def embed(
    encoder: TextEncoder, texts: Sequence[str], cache: Path | None, progress: Progress | None = None
) -> FloatArray:
    """``encoder.encode(texts)``, float32 [n, width]; vectors that ``cache`` holds are not computed again.

    Kept by content: under the encoder's fingerprint, by the sha256 of what is read of a text. Texts are
    worked on CHUNK at a time and every finished chunk is kept, so a run that was killed goes on where it was.
    An encoder that is fitted anew each time (TF-IDF) has no fingerprint, and ``cache`` is left alone. Raises
    CodecError when the encoder gives vectors of another width than its own, or a value that is not a number.
    """
    if cache is None or encoder.fingerprint is None:
        return _checked(encoder, texts)
    say = progress or (lambda _done, _of: None)
    kept = _Embeddings(cache / encoder.fingerprint[:32], encoder.width)
    keys = [hashlib.sha256(text[:MAX_TEXT].encode("utf-8", "surrogatepass")).digest() for text in texts]
    wanted = dict(zip(keys, texts, strict=True))
    found = kept.read(set(wanted))
    missing = [key for key in wanted if key not in found]
    say(len(wanted) - len(missing), len(wanted))
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        vectors = _checked(encoder, [wanted[key] for key in chunk])
        kept.write(chunk, vectors)
        found |= dict(zip(chunk, vectors, strict=True))
        say(len(found), len(wanted))
    return np.array([found[key] for key in keys], dtype=np.float32).reshape(len(texts), encoder.width)


def fit_tfidf(texts: Sequence[str], *, dimension: int, vocabulary: int, ngrams: int) -> TfidfEncoder:
    """Vocabulary, idf and projection of ``texts``; deterministic.

    The vocabulary is the ``vocabulary`` terms of highest document frequency among those in at least two texts
    (ties: alphabetical). idf = ln((1 + n) / (1 + df)) + 1, as scikit-learn's.
    """
    words, idf, matrix = _fitted(texts, vocabulary=vocabulary, ngrams=ngrams)
    components = np.zeros((len(words), dimension), dtype=np.float32)
    if matrix.nnz:
        _, singular, right = truncated_svd(matrix, dimension)
        components[:, : len(singular)] = right.T
    return TfidfEncoder(words, idf.astype(np.float32), components, ngrams)


def tfidf_matrix(texts: Sequence[str], *, vocabulary: int, ngrams: int) -> sparse.csr_matrix:
    """Sublinear TF-IDF of ``texts`` by their own vocabulary, as ``fit_tfidf`` has it: CSR [n, V], rows of
    length 1, or 0 for a text without a known term."""
    return _fitted(texts, vocabulary=vocabulary, ngrams=ngrams)[2]


def _fitted(
    texts: Sequence[str], *, vocabulary: int, ngrams: int
) -> tuple[dict[str, int], npt.NDArray[np.float64], sparse.csr_matrix]:
    """(term -> column, idf [V], the texts' own weights)."""
    documents = [terms(text, ngrams) for text in texts]
    frequency: dict[str, int] = {}
    for document in documents:
        for term in set(document):
            frequency[term] = frequency.get(term, 0) + 1
    least = 2 if len(texts) >= 20 else 1
    kept = sorted(
        (term for term, count in frequency.items() if count >= least), key=lambda t: (-frequency[t], t)
    )
    words = {term: row for row, term in enumerate(sorted(kept[:vocabulary]))}
    idf = np.array([np.log((1 + len(texts)) / (1 + frequency[term])) + 1 for term in words], dtype=np.float64)
    matrix = _weights(documents, words, idf)
    return words, idf, matrix


class _Embeddings:
    """Chunks of vectors by key in one folder, each a safetensors file that is whole or not there.

    A chunk is written beside its place and renamed; what a killed process left half written (``.partial``) is
    never read. A chunk that cannot be read is deleted, and its texts are embedded again.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width

    def read(self, wanted: set[bytes]) -> dict[bytes, FloatArray]:
        """Vectors of those of ``wanted`` that are kept."""
        found: dict[bytes, FloatArray] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            found |= {key: vector for key, vector in self._chunk(file) if key in wanted}
        return found

    def write(self, keys: Sequence[bytes], vectors: FloatArray) -> None:
        """Keep one chunk."""
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        partial = place.with_suffix(f".{os.getpid()}{_PARTIAL}")
        try:
            packed = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), 32)
            save_file({"keys": packed, "vectors": np.ascontiguousarray(vectors)}, partial)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)

    def _chunk(self, file: Path) -> Iterator[tuple[bytes, FloatArray]]:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(file)
            keys, vectors = tensors["keys"], tensors["vectors"]
        except (SafetensorError, KeyError):
            file.unlink()
            return
        if vectors.shape != (len(keys), self.width):
            file.unlink()
            return
        yield from zip((key.tobytes() for key in keys), vectors, strict=True)


def _checked(encoder: TextEncoder, texts: Sequence[str]) -> FloatArray:
    vectors = encoder.encode(texts)
    if vectors.shape != (len(texts), encoder.width):
        raise CodecError(
            f"the text encoder gave vectors of shape {vectors.shape} for {len(texts)} texts, "
            f"not of its width {encoder.width}; check the model directory"
        )
    wrong = ~np.isfinite(vectors).all(axis=1)
    if wrong.any():
        text = texts[int(wrong.argmax())]
        raise CodecError(
            f"the text encoder gave a value that is not a number for {text[:60]!r}; check the model directory"
        )
    return vectors


def _weights(
    documents: Sequence[Sequence[str]], words: dict[str, int], idf: npt.NDArray[np.float64]
) -> sparse.csr_matrix:
    """Sublinear TF-IDF, rows of length 1: CSR [n, V]."""
    rows, columns = [], []
    for row, document in enumerate(documents):
        known = [words[term] for term in document if term in words]
        rows += [row] * len(known)
        columns += known
    counts = sparse.coo_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(documents), len(words))
    ).tocsr()
    counts.sum_duplicates()
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1))).ravel()
    return sparse.diags(np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)) @ counts
