"""Fit a codec: item text and training histories in, a codec directory and a report out.

Text and behaviour embeddings of every item are put side by side, quantized by an RQ-VAE, and collisions are
resolved so that one SCID is one item. The codec is leak-free by construction: behaviour comes from the
histories it is given and from nowhere else, so the caller leaves out what must not be seen.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from policies.codec import ScidCodec
from policies.quantizer import ItemEncoder, Quantizer, TextEncoder
from trainer.errors import CannotTrain
from trainer.settings import TokenizationSettings

from .collaborative import collaborative_embeddings
from .quality import codebook_perplexity, codebook_use
from .text import fit_text_encoder, item_texts, require_text
from .unique import unique_codes

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int32]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


REPORT = "report.json"
"""Lies beside a fitted codec (policies carry the codec without it)."""


@dataclass(frozen=True)
class TokenizationReport:
    """What a fit gave, for people and for lineage."""

    items: int
    sizes: tuple[int, ...]
    method: str
    text_encoder: str
    """"tfidf-svd" or "sentence"."""
    items_without_text: int
    items_without_behaviour: int
    collision_rate: float
    """Share of items that shared an SCID before resolution; afterwards none does."""
    moved: int
    """Items whose last code the resolution changed."""
    use: tuple[float, ...]
    """Share of the codes of each level that some item has."""
    perplexity: tuple[float, ...]
    """exp(entropy) of each level's codes over the items."""
    quantizer_hash: str
    item_map_hash: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def fit_codec(
    items: pa.Table,
    histories: Sequence[Sequence[str]],
    settings: TokenizationSettings,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TokenizationReport:
    """Fit and write the codec directory ``out`` (replaced when it exists).

    ``items``: a table with ``item_id`` (string, distinct) and any of title, text, categories. ``histories``:
    item ids of each training user, oldest first; ids that are no item are left out. Same input, settings and
    seed: same codec (CPU). Raises CannotTrain for an empty catalogue, MissingText for an item without text
    unless settings allow it, CodecError for ids that come twice.
    """
    started = time.perf_counter()
    say = progress or (lambda _what, _done, _all: None)
    item_ids = [str(item_id) for item_id in items.column("item_id").to_pylist()]
    if not item_ids:
        raise CannotTrain("the catalogue is empty; load items with `align3gr catalogue load FILE`")
    texts = item_texts(items)
    if settings.without_text == "refuse":
        require_text(item_ids, texts)

    say("text", 0, 1)
    text_encoder = fit_text_encoder(
        texts,
        directory=settings.text_encoder,
        dimension=settings.text_dimension,
        vocabulary=settings.vocabulary,
        ngrams=settings.ngrams,
    )
    text = text_encoder.encode(texts)
    say("behaviour", 0, 1)
    behaviour = _behaviour(item_ids, histories, settings)
    known = np.linalg.norm(behaviour, axis=1) > 0
    bridge = _bridge(text, behaviour, known)
    behaviour = np.where(known[:, None], behaviour, text @ bridge[:-1] + bridge[-1]).astype(np.float32)

    vectors = np.concatenate([text, behaviour], axis=1)
    quantizer = _fit_quantizer(vectors, text.shape[1], bridge, settings, seed, device, say)
    codes, residuals = quantize(quantizer, vectors)
    resolved = unique_codes(codes, residuals, quantizer.codebooks[-1])
    codec = _write(out, item_ids, resolved.codes, resolved.sizes, text_encoder, quantizer)
    report = TokenizationReport(
        items=len(item_ids),
        sizes=resolved.sizes,
        method=settings.method,
        text_encoder=text_encoder.kind,
        items_without_text=sum(not text for text in texts),
        items_without_behaviour=int((~known).sum()),
        collision_rate=resolved.collision_rate,
        moved=resolved.moved,
        use=codebook_use(resolved.codes, resolved.sizes),
        perplexity=codebook_perplexity(resolved.codes),
        quantizer_hash=codec.quantizer_hash,
        item_map_hash=codec.item_map_hash,
        seconds=time.perf_counter() - started,
    )
    (out / REPORT).write_text(json.dumps(report.as_dict()), encoding="utf-8")
    return report


def codes_for(n_items: int, settings: TokenizationSettings) -> int:
    """Codes a level: as set, or 2 sqrt(n) rounded up to a power of two, within 4 .. 256.

    The rule keeps about four times as many two-code prefixes as items, so that the third level mostly only
    tells near-duplicates apart; from 4,097 items on it is the paper's 256.
    """
    if settings.codes is not None:
        return settings.codes
    return int(min(256, max(4, 2 ** math.ceil(math.log2(2 * math.sqrt(n_items))))))


def quantize(quantizer: Quantizer, vectors: FloatArray) -> tuple[CodeArray, FloatArray]:
    """(codes int32 [n, L], residuals before the last level float32 [n, z])."""
    codes = quantizer.encode(vectors)
    residual = quantizer.latent(vectors)
    for level, book in enumerate(quantizer.codebooks[:-1]):
        residual = residual - book[codes[:, level]]
    return codes, residual


def _behaviour(
    item_ids: Sequence[str], histories: Sequence[Sequence[str]], settings: TokenizationSettings
) -> FloatArray:
    """float32 [n_items, d], rows of length ``collaborative_weight`` or 0."""
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    rows = [
        np.array([index[item] for item in history if item in index], dtype=np.int64) for history in histories
    ]
    vectors = collaborative_embeddings(
        rows,
        len(item_ids),
        dimension=settings.collaborative_dimension,
        window=settings.window,
        shift=settings.shift,
    )
    return vectors * np.float32(settings.collaborative_weight)


def _bridge(text: FloatArray, behaviour: FloatArray, known: npt.NDArray[np.bool_]) -> FloatArray:
    """Ridge regression of behaviour on [text, 1] over the items that have both: [text width + 1, d]."""
    inputs = np.concatenate([text, np.ones((len(text), 1), dtype=np.float32)], axis=1)[known].astype(
        np.float64
    )
    ridge = np.eye(inputs.shape[1]) * max(1e-2 * len(inputs), 1.0)
    solution = np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ behaviour[known])
    return np.asarray(solution, dtype=np.float32)


def _fit_quantizer(
    vectors: FloatArray,
    text_width: int,
    bridge: FloatArray,
    settings: TokenizationSettings,
    seed: int,
    device: str,
    say: Progress,
) -> Quantizer:
    from .rqvae import RqVaeShape, RqVaeTraining, residual_kmeans, train_rqvae

    codes = codes_for(len(vectors), settings)
    # One scale for all columns: text and behaviour keep the weights their lengths give them.
    mean = vectors.mean(axis=0)
    spread = float(np.sqrt(np.mean((vectors - mean) ** 2))) or 1.0
    scale = np.full(vectors.shape[1], spread, dtype=np.float32)
    scaled = ((vectors - mean) / scale).astype(np.float32)
    if settings.method == "rqkmeans":
        books = residual_kmeans(scaled, settings.levels, codes, seed=seed)
        return Quantizer(tuple(books), mean, scale, text_width=text_width, bridge=bridge, kind="rqkmeans")
    shape = RqVaeShape(
        input_dim=vectors.shape[1],
        hidden=settings.hidden,
        code_dim=settings.code_dimension,
        levels=settings.levels,
        codes=codes,
    )
    training = RqVaeTraining(
        steps=settings.steps,
        batch=settings.batch_size,
        learning_rate=settings.learning_rate,
        commitment=settings.commitment,
        warm_up_steps=int(settings.warm_up * settings.steps),
        revive_every=settings.revive_every,
        polish_iterations=settings.polish,
    )
    model = train_rqvae(
        scaled, shape, training, seed=seed, device=device, progress=lambda done, of, _: say("rqvae", done, of)
    )
    weights, biases = model.encoder_arrays()
    return Quantizer(
        tuple(book.detach().numpy().copy() for book in model.codebooks),
        mean,
        scale,
        weights,
        biases,
        text_width=text_width,
        bridge=bridge,
    )


def _write(
    out: Path,
    item_ids: Sequence[str],
    codes: CodeArray,
    sizes: Sequence[int],
    text_encoder: TextEncoder,
    quantizer: Quantizer,
) -> ScidCodec:
    """Write beside ``out``, then take its place: a reader never finds half a codec."""
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        quantizer_hash = ItemEncoder(text_encoder, quantizer).save(staging / "quantizer")
        codec = ScidCodec(item_ids, codes, sizes, quantizer_hash=quantizer_hash)
        codec.save(staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ScidCodec.load(out)
