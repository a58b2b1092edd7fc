"""Text embeddings of items: which encoder, and fitting it.

TF-IDF projected on its leading singular vectors is fitted here, in seconds and without a download; a local
sentence-transformers directory is only opened. Which one was used is written into the codec
(``policies.quantizer`` holds both at inference), and neither ever stands in for the other.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from policies.quantizer import SentenceEncoder, TextEncoder, TfidfEncoder, terms
from trainer.errors import MissingText

from .svd import truncated_svd

FloatArray = npt.NDArray[np.float32]


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


def fit_tfidf(texts: Sequence[str], *, dimension: int, vocabulary: int, ngrams: int) -> TfidfEncoder:
    """Vocabulary, idf and projection of ``texts``; deterministic.

    The vocabulary is the ``vocabulary`` terms of highest document frequency among those in at least two texts
    (ties: alphabetical). idf = ln((1 + n) / (1 + df)) + 1, as scikit-learn's.
    """
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
    components = np.zeros((len(words), dimension), dtype=np.float32)
    if matrix.nnz:
        _, singular, right = truncated_svd(matrix, dimension)
        components[:, : len(singular)] = right.T
    return TfidfEncoder(words, idf.astype(np.float32), components, ngrams)


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
