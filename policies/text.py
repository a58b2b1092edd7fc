"""Text to vectors for the quantizer: TF-IDF with singular vectors, or a sentence-transformers directory.

Frozen once saved, plain arrays (JSON and safetensors): nothing is unpickled, scikit-learn is not imported.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError

Vectors = NDArray[np.float32]

MAX_TEXT = 20_000
"""Characters of an item's text that are read; the rest of a longer one adds nothing to its meaning."""

_AT_ONCE = 256
"""Texts whose terms are weighed together: as large as their vectors fit a processor's cache."""


class TextEncoder(Protocol):
    """Text to vectors; frozen once saved."""

    @property
    def kind(self) -> str:
        """ "tfidf-svd" or "sentence"."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Names what ``encode`` computes, so that it can be kept; none where every fit makes another."""
        ...

    @property
    def width(self) -> int:
        """Columns of what ``encode`` returns."""
        ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), width]."""
        ...

    def save(self, directory: Path) -> None:
        """Write text.json (and text.safetensors) into ``directory``."""
        ...


@dataclass(frozen=True)
class TfidfEncoder:
    """TF-IDF projected on its leading singular vectors; equal to scikit-learn's with the same parameters.

    ``tf = 1 + ln(count)``, times ``idf``, scaled to length 1, times ``components``, scaled to length 1.
    A text without a known word is the zero vector.
    """

    vocabulary: Mapping[str, int]
    """Word (or two words joined by a space when ``ngrams`` is 2) -> row of ``components``."""
    idf: Vectors
    """[V]"""
    components: Vectors
    """[V, width]"""
    ngrams: int = 1
    kind: str = field(default="tfidf-svd", init=False)
    fingerprint: None = field(default=None, init=False)

    @property
    def width(self) -> int:
        """Columns of what ``encode`` returns."""
        return int(self.components.shape[1])

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), width], rows of length 1 (or 0)."""
        out = np.zeros((len(texts), self.width), dtype=np.float32)
        for start in range(0, len(texts), _AT_ONCE):
            self._encode_into(out[start : start + _AT_ONCE], texts[start : start + _AT_ONCE])
        return out

    def save(self, directory: Path) -> None:
        """Write text.json and text.safetensors into ``directory``."""
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        words = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        facts = {"kind": self.kind, "ngrams": self.ngrams, "vocabulary": words}
        (directory / "text.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
        save_file(
            {"idf": plain(self.idf), "components": plain(self.components)}, directory / "text.safetensors"
        )

    def _encode_into(self, out: Vectors, texts: Sequence[str]) -> None:
        """Fill [len(texts), width] of zeros. All texts as one sorted list of (row, term), without a loop over
        terms; dividing by the weights' own length first would be undone by the last line."""
        of = self.vocabulary.get
        found = [
            [row for term in terms(text, self.ngrams) if (row := of(term)) is not None] for text in texts
        ]
        row_of = np.repeat(np.arange(len(texts)), [len(one) for one in found])
        size = len(self.vocabulary)
        keys = row_of * size + np.array(list(itertools.chain.from_iterable(found)), dtype=np.int64)
        if len(keys) == 0:
            return
        keys.sort()
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.diff(first, append=len(keys))
        rows, term = np.divmod(keys[first], size)
        weight = ((1 + np.log(counts)) * self.idf[term]).astype(np.float32)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        sums = np.add.reduceat(self.components[term] * weight[:, None], starts)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        out[rows[starts]] = np.divide(sums, norms, out=np.zeros_like(sums), where=norms > 0)


@dataclass(frozen=True)
class SentenceEncoder:
    """A local sentence-transformers directory, named and fingerprinted, not copied.

    The directory must be where it was when the codec was fitted, with the same bytes; ``encode`` refuses
    anything else. A process reads and checks it once.
    """

    directory: Path
    fingerprint: str
    """sha256 over the directory's files."""
    dimensions: int
    kind: str = field(default="sentence", init=False)

    @classmethod
    def open(cls, directory: Path) -> "SentenceEncoder":
        """Name a directory that holds a sentence-transformers model. Raises CodecError when it does not."""
        model = _sentence_model(directory)
        return cls(directory, directory_hash(directory), int(model.get_embedding_dimension()))

    @property
    def width(self) -> int:
        """Columns of what ``encode`` returns."""
        return self.dimensions

    def encode(self, texts: Sequence[str]) -> Vectors:
        """float32 [len(texts), width], rows of length 1."""
        model = _verified_model(self.directory, self.fingerprint)
        vectors = model.encode(
            [text[:MAX_TEXT] for text in texts], normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float32)

    def save(self, directory: Path) -> None:
        """Write text.json into ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        facts = {
            "kind": self.kind,
            "directory": str(self.directory),
            "fingerprint": self.fingerprint,
            "dimensions": self.dimensions,
        }
        (directory / "text.json").write_text(json.dumps(facts), encoding="utf-8")


def load_text_encoder(directory: Path) -> TextEncoder:
    """Read what ``save`` wrote. Raises CodecError for a kind this version does not know."""
    from safetensors.numpy import load_file

    facts = json.loads((directory / "text.json").read_text(encoding="utf-8"))
    if facts["kind"] == "sentence":
        return SentenceEncoder(Path(facts["directory"]), facts["fingerprint"], facts["dimensions"])
    if facts["kind"] != "tfidf-svd":
        raise CodecError(f"text encoder {facts['kind']!r} is unknown here; update align3gr")
    tensors = load_file(directory / "text.safetensors")
    vocabulary = {word: row for row, word in enumerate(facts["vocabulary"])}
    return TfidfEncoder(vocabulary, tensors["idf"], tensors["components"], facts["ngrams"])


def terms(text: str, ngrams: int = 1) -> list[str]:
    """Lower-case words of two or more letters or digits; with ``ngrams`` 2 also each pair of neighbours."""
    words = re.findall(r"\b\w\w+\b", text[:MAX_TEXT].lower())
    if ngrams < 2:
        return words
    return words + [f"{left} {right}" for left, right in itertools.pairwise(words)]


def directory_hash(directory: Path) -> str:
    """sha256 over the names and bytes of the files below ``directory``, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        with file.open("rb") as handle:
            inner = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(directory).as_posix()}\0{inner}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _verified_model(directory: Path, fingerprint: str) -> Any:
    """The model of ``directory``, its bytes checked before it is read."""
    if not directory.is_dir():
        raise CodecError(
            f"the sentence encoder {directory} of this codec is gone; put it back to code new items"
        )
    if directory_hash(directory) != fingerprint:
        raise CodecError(
            f"the sentence encoder {directory} changed since the codec was fitted; "
            "restore it, or fit a new codec with `align3gr tokenize`"
        )
    return _sentence_model(directory)


def _sentence_model(directory: Path) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise CodecError(
            "this codec needs sentence-transformers; install it with `pip install 'align3gr[text]'`"
        ) from error
    try:
        return SentenceTransformer(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise CodecError(f"{directory} is no sentence-transformers directory: {cause}") from error


def plain(array: Vectors) -> Vectors:
    """As safetensors takes it: contiguous float32."""
    return np.ascontiguousarray(array, dtype=np.float32)
