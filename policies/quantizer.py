"""What a deployed policy needs to give an item an SCID: text encoder and residual quantizer, inference only.

``trainer.tokenization`` fits these; this module loads them, applies them and writes them. Everything is plain
arrays (JSON and safetensors, numpy arithmetic): nothing is unpickled and torch is not imported.

The vector of an item is ``[text part | collaborative part]``. An item nobody has met has no collaborative
part: it is predicted from the text by the linear ``bridge`` (zeros when there is none).

A quantizer directory::

    quantizer.json         kind, sizes, text_width, activation
    quantizer.safetensors  mean, scale [d]; weight.0.. [in, out]; bias.0.. [out]; codebook.0.. [K, z]; bridge
    text.json              kind ("tfidf-svd" | "sentence"), vocabulary or directory name, parameters
    text.safetensors       idf [V], components [V, d] (tfidf-svd only)
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CodecError
from .text import (
    SentenceEncoder,
    TextEncoder,
    TfidfEncoder,
    Vectors,
    directory_hash,
    load_text_encoder,
    plain,
    terms,
)

__all__ = [
    "Codes",
    "ItemEncoder",
    "Quantizer",
    "SentenceEncoder",
    "TextEncoder",
    "TfidfEncoder",
    "Vectors",
    "directory_hash",
    "distances",
    "terms",
]

Codes = NDArray[np.int32]


@dataclass(frozen=True)
class Quantizer:
    """Residual quantizer: an MLP (none for RQ k-means), then at each level the nearest code of what is left.

    ``z = MLP((x - mean) / scale)``, ReLU between layers, none after the last;
    ``c_l = argmin_k |r_l - C_l[k]|``, ``r_0 = z``, ``r_{l+1} = r_l - C_l[c_l]``.
    """

    codebooks: tuple[Vectors, ...]
    """One [K_l, z] a level."""
    mean: Vectors
    """[d]"""
    scale: Vectors
    """[d], positive."""
    weights: tuple[Vectors, ...] = ()
    """MLP layers, each [in, out]; the last one's out is z. Torch's ``Linear.weight`` is the transpose."""
    biases: tuple[Vectors, ...] = ()
    text_width: int = 0
    """How many leading inputs are the text's; the other d - text_width are collaborative."""
    bridge: Vectors | None = None
    """[text_width + 1, d - text_width]: predicts the collaborative part from [text, 1]."""
    kind: str = "rqvae"
    """"rqvae" or "rqkmeans"."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes at each level."""
        return tuple(len(book) for book in self.codebooks)

    @property
    def width(self) -> int:
        """Columns of the vectors it takes."""
        return len(self.mean)

    def vectors_of_text(self, text_vectors: Vectors) -> Vectors:
        """[n, text_width] -> [n, width]: the vectors of items that have no behaviour yet."""
        collaborative = np.zeros((len(text_vectors), self.width - self.text_width), dtype=np.float32)
        if self.bridge is not None:
            collaborative = (text_vectors @ self.bridge[:-1] + self.bridge[-1]).astype(np.float32)
        return np.concatenate([text_vectors.astype(np.float32), collaborative], axis=1)

    def latent(self, vectors: Vectors) -> Vectors:
        """[n, width] -> [n, z]. Raises CodecError for another width or a value that is not a number."""
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise CodecError(f"vectors have shape {vectors.shape}, the quantizer takes [n, {self.width}]")
        if not np.isfinite(vectors).all():
            raise CodecError(
                "vectors hold a value that is not a number; look at the embeddings of the new items"
            )
        z = (vectors.astype(np.float32) - self.mean) / self.scale
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                z = np.maximum(z, 0)
            z = z @ weight + bias
        return z.astype(np.float32)

    def encode(self, vectors: Vectors, *, chunk: int = 65_536) -> Codes:
        """[n, width] -> int32 [n, L], bounded memory. Two items may meet in one code: see ``place``."""
        out = np.empty((len(vectors), len(self.codebooks)), dtype=np.int32)
        for start in range(0, len(vectors), chunk):
            residual = self.latent(vectors[start : start + chunk])
            for level, book in enumerate(self.codebooks):
                nearest = distances(residual, book).argmin(axis=1)
                out[start : start + chunk, level] = nearest
                residual = residual - book[nearest]
        return out

    def place(self, vectors: Vectors, sizes: Sequence[int], taken: Codes) -> Codes:
        """Codes for new items, each unique and none in ``taken`` ([m, L'] over ``sizes``).

        The nearest prefix that has a free last code, then its nearest free code. A codec with a
        disambiguating level more than the quantizer has takes the smallest free number there. Raises
        CodecError when every SCID is taken.
        """
        used = {tuple(row) for row in taken.tolist()}
        out = np.empty((len(vectors), len(sizes)), dtype=np.int32)
        latents = self.latent(vectors)
        for row, latent in enumerate(latents):
            code = _nearest_free(latent, self.codebooks, tuple(sizes), used)
            if code is None:
                raise CodecError("every SCID is taken; fit a larger codec with `align3gr tokenize`")
            used.add(code)
            out[row] = code
        return out

    def save(self, directory: Path) -> None:
        """Write quantizer.json and quantizer.safetensors into ``directory``."""
        from safetensors.numpy import save_file

        directory.mkdir(parents=True, exist_ok=True)
        tensors = {"mean": plain(self.mean), "scale": plain(self.scale)}
        tensors |= {f"codebook.{i}": plain(book) for i, book in enumerate(self.codebooks)}
        tensors |= {f"weight.{i}": plain(weight) for i, weight in enumerate(self.weights)}
        tensors |= {f"bias.{i}": plain(bias) for i, bias in enumerate(self.biases)}
        if self.bridge is not None:
            tensors["bridge"] = plain(self.bridge)
        facts = {"kind": self.kind, "sizes": self.sizes, "text_width": self.text_width}
        (directory / "quantizer.json").write_text(json.dumps(facts), encoding="utf-8")
        save_file(tensors, directory / "quantizer.safetensors")

    @classmethod
    def load(cls, directory: Path) -> "Quantizer":
        """Read what ``save`` wrote. Raises OSError, KeyError or ValueError for anything else."""
        from safetensors.numpy import load_file

        facts = json.loads((directory / "quantizer.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "quantizer.safetensors")

        def numbered(name: str) -> tuple[Vectors, ...]:
            count = sum(key.startswith(f"{name}.") for key in tensors)
            return tuple(tensors[f"{name}.{i}"] for i in range(count))

        return cls(
            codebooks=numbered("codebook"),
            mean=tensors["mean"],
            scale=tensors["scale"],
            weights=numbered("weight"),
            biases=numbered("bias"),
            text_width=facts["text_width"],
            bridge=tensors.get("bridge"),
            kind=facts["kind"],
        )


@dataclass(frozen=True)
class ItemEncoder:
    """Text encoder and quantizer as one: item text in, codes out."""

    text: TextEncoder
    quantizer: Quantizer

    def encode(self, texts: Sequence[str]) -> Codes:
        """int32 [n, L] of items known by their text alone (not made unique)."""
        return self.quantizer.encode(self.vectors(texts))

    def stream(self, texts: Iterable[str], *, chunk: int = 8_192) -> Iterator[Codes]:
        """``encode`` of any number of texts in bounded memory: int32 [chunk, L] after each ``chunk``."""
        remaining = iter(texts)
        while batch := list(islice(remaining, chunk)):
            yield self.encode(batch)

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """[n, width] of items known by their text alone."""
        return self.quantizer.vectors_of_text(self.text.encode(texts))

    def place(self, texts: Sequence[str], sizes: Sequence[int], taken: Codes) -> Codes:
        """int32 [n, L'] of new items known by their text alone, unique and none in ``taken``."""
        return self.quantizer.place(self.vectors(texts), sizes, taken)

    def save(self, directory: Path) -> str:
        """Write both into ``directory``; returns the quantizer hash (``directory_hash``)."""
        self.text.save(directory)
        self.quantizer.save(directory)
        return directory_hash(directory)

    @classmethod
    def load(cls, directory: Path) -> "ItemEncoder":
        """Raises CodecError when a file is missing or unreadable."""
        try:
            return cls(load_text_encoder(directory), Quantizer.load(directory))
        except (OSError, KeyError, ValueError) as error:
            cause = " ".join(str(error).split())
            raise CodecError(
                f"quantizer {directory} cannot be read: {cause}; restore it from a backup"
            ) from error


def distances(residual: Vectors, book: Vectors) -> Vectors:
    """[n, z], [K, z] -> [n, K] squared distances up to a term that is the same for a row."""
    squares = (book * book).sum(axis=1)
    return np.asarray(squares - 2 * (residual @ book.T), dtype=np.float32)


def _nearest_free(
    latent: Vectors,
    codebooks: tuple[Vectors, ...],
    sizes: tuple[int, ...],
    used: set[tuple[int, ...]],
) -> tuple[int, ...] | None:
    """Depth-first over codes, nearest first: the first complete code that nobody has."""

    def descend(prefix: tuple[int, ...], residual: Vectors) -> tuple[int, ...] | None:
        level = len(prefix)
        if level == len(sizes):
            return None if prefix in used else prefix
        if level >= len(codebooks):
            order: Sequence[int] = range(sizes[level])
            step = None
        else:
            order = distances(residual[None], codebooks[level])[0].argsort(kind="stable").tolist()
            step = codebooks[level]
        for code in order:
            found = descend((*prefix, int(code)), residual if step is None else residual - step[code])
            if found is not None:
                return found
        return None

    return descend((), latent)
