"""Fit a codec: catalogue and training histories in, a codec directory and a report out.

Frozen encoders give every item a text and a behaviour vector; a user's are made of those of the items of the
history (``frozen``). SC encoders bring users beside what they take (U2I), RQ-VAEs turn both into codes
(``joint``), and collisions of items are resolved so that one SCID is one item (``unique``). The codec is
leak-free by construction: behaviour comes from the histories it is given and from nowhere else, so the caller
leaves out what must not be seen.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from policies.codec import ScidCodec
from policies.quantizer import ItemEncoder, Quantizer
from policies.users import UserEncoder
from trainer.settings import TokenizationSettings

from .frozen import FitRun, FloatArray, Frozen, Material, Progress, freeze
from .joint import Joint, JointTraining, train_jointly
from .quality import CodeArray, codebook_perplexity, codebook_use
from .report import REPORT, TokenizationReport, sharing, watched_pairs
from .rqvae import RqVaeShape, RqVaeTraining, residual_kmeans, train_rqvae
from .sides import Side, centre, linear_arrays
from .unique import unique_codes


def fit_codec(
    items: pa.Table,
    histories: Sequence[Sequence[str]],
    settings: TokenizationSettings,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    leave_out: int = 0,
    checkpoint: Path | None = None,
    embeddings: Path | None = None,
    progress: Progress | None = None,
) -> TokenizationReport:
    """Fit and write the codec directory ``out`` (replaced when it exists).

    ``items``: a table with ``item_id`` (string, distinct) and any of title, text, categories. ``histories``:
    item ids of each training user, oldest first; ids that are no item are left out. ``leave_out``: how many
    of each user's last interactions nothing may look at (2: validation and test of the leave-one-out
    protocol). ``checkpoint``: folder for the state of an interrupted fit, which the same call continues.
    ``embeddings``: folder where a sentence encoder's vectors are kept. Same input, settings and seed: same
    codec (CPU).

    With fewer pairs than ``alignment.min_pairs`` nothing is aligned and users get no SCIDs: the report says
    so. Raises CannotTrain for an empty catalogue, MissingText for an item without text unless
    settings allow it, CodecError for ids that come twice.
    """
    started = time.perf_counter()
    seen = [history[: max(len(history) - leave_out, 0)] for history in histories]
    material = Material.of(items, seen, settings)
    run = FitRun(
        settings=settings,
        seed=seed,
        device=device,
        progress=progress or (lambda *_: None),
        checkpoints=checkpoint,
        key="" if checkpoint is None else material.key(settings, seed, device),
    )
    frozen = freeze(material, run, embeddings=embeddings)
    trained = _Training(material, frozen, run).train()
    codes, residuals = quantize(trained.quantizer, frozen.vectors)
    resolved = unique_codes(codes, residuals, trained.quantizer.codebooks[-1])
    codec = _write(out, material, frozen, resolved.codes, resolved.sizes, trained)
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    user_codes = codec.encode_user_rows([history for history in material.histories if len(history)])
    coded = user_codes if codec.user_sizes else user_codes[:0]
    report = TokenizationReport(
        items=len(material.item_ids),
        sizes=resolved.sizes,
        method=settings.method,
        text_encoder=frozen.text_encoder.kind,
        collaborative=settings.collaborative.method,
        pairs=len(frozen.interactions.pairs),
        aligned=trained.watched is not None,
        items_without_text=sum(not text for text in material.texts),
        items_without_behaviour=int((~frozen.known).sum()),
        collision_rate=resolved.collision_rate,
        moved=resolved.moved,
        use=codebook_use(resolved.codes, resolved.sizes),
        perplexity=codebook_perplexity(resolved.codes),
        quantizer_hash=codec.quantizer_hash,
        item_map_hash=codec.item_map_hash,
        users=len(coded),
        user_sizes=codec.user_sizes,
        **sharing(coded, codec.user_sizes),
        **watched_pairs(trained.watched),
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


@dataclass(frozen=True)
class _Trained:
    """Both sides as a codec takes them."""

    quantizer: Quantizer
    users: UserEncoder | None
    watched: Joint | None


class _Training:
    """From frozen vectors to the quantizers of both sides."""

    def __init__(self, material: Material, frozen: Frozen, run: FitRun) -> None:
        self.material, self.frozen, self.run, self.settings = material, frozen, run, run.settings

    def train(self) -> _Trained:
        """Quantizers of both sides, aligned when there is enough to align by."""
        settings, frozen, histories = self.settings, self.frozen, self.material.histories
        item_shape = self._shape(codes_for(len(self.material.item_ids), settings))
        user_shape = None
        if settings.users and frozen.enough:
            user_shape = self._shape(codes_for(sum(len(history) > 0 for history in histories), settings))
        if settings.alignment.method == "u2i" and frozen.enough:
            return self._jointly(item_shape, user_shape)
        items = self._alone("codes", frozen.vectors, item_shape, self.run.seed)
        users = None
        if user_shape is not None:
            vectors = frozen.user_vectors(frozen.interactions.pairs)
            users = self._alone("user codes", vectors, user_shape, self.run.seed + 1)
        return self._trained(items, users, None)

    def _jointly(self, item_shape: RqVaeShape, user_shape: RqVaeShape | None) -> _Trained:
        to, frozen = self.settings.alignment, self.frozen
        joint = train_jointly(
            frozen,
            JointTraining(
                hidden=to.hidden,
                width=to.dimension,
                epochs=to.epochs,
                patience=to.patience,
                batch=to.batch_size,
                learning_rate=to.learning_rate,
                log_q=to.log_q,
                alpha=to.alpha,
                gamma=to.gamma,
                drop_behaviour=to.drop_behaviour,
                behaviour_weight=self.settings.collaborative.weight,
                method=self.settings.method,
                quantizer=self._rqvae_training(),
            ),
            replace(item_shape, input_dim=to.dimension),
            None if user_shape is None else replace(user_shape, input_dim=to.dimension),
            seed=self.run.seed,
            device=self.run.device,
            checkpoint=self.run.checkpoint("joint"),
            progress=self.run.progress,
        )
        return self._trained(joint.items, joint.users, joint)

    def _alone(self, what: str, vectors: FloatArray, shape: RqVaeShape, seed: int) -> Side:
        """Quantize frozen vectors as they are."""
        mean, scale = centre(vectors, self.frozen.items.text.shape[1], self.settings.collaborative.weight)
        scaled = ((vectors - mean) / scale).astype("float32")
        if self.settings.method == "rqkmeans":
            books = residual_kmeans(scaled, shape.levels, shape.codes, seed=seed)
            return Side(mean, scale, (), (), tuple(books))
        model = train_rqvae(
            scaled,
            shape,
            self._rqvae_training(),
            seed=seed,
            device=self.run.device,
            progress=lambda done, of, _: self.run.progress(what, done, of),
        )
        layers = linear_arrays(model.encoder)
        return Side(
            mean,
            scale,
            tuple(weight for weight, _ in layers),
            tuple(bias for _, bias in layers),
            tuple(book.detach().numpy().copy() for book in model.codebooks),
        )

    def _trained(self, items: Side, users: Side | None, watched: Joint | None) -> _Trained:
        kind, frozen = self.settings.method, self.frozen
        coder = None
        if users is not None:
            coder = UserEncoder(_quantizer(users, kind), frozen.attention)
        quantizer = _quantizer(items, kind, text_width=frozen.items.text.shape[1], bridge=frozen.bridge)
        return _Trained(quantizer, coder, watched)

    def _shape(self, codes: int) -> RqVaeShape:
        return RqVaeShape(
            input_dim=self.frozen.vectors.shape[1],
            hidden=self.settings.hidden,
            code_dim=self.settings.code_dimension,
            levels=self.settings.levels,
            codes=codes,
        )

    def _rqvae_training(self) -> RqVaeTraining:
        settings = self.settings
        return RqVaeTraining(
            steps=settings.steps,
            batch=settings.batch_size,
            learning_rate=settings.learning_rate,
            commitment=settings.commitment,
            warm_up_steps=int(settings.warm_up * settings.steps),
            revive_every=settings.revive_every,
            polish_iterations=settings.polish,
            decay=settings.decay if settings.codebooks == "moving" else 0.0,
        )


def _quantizer(side: Side, kind: str, *, text_width: int = 0, bridge: FloatArray | None = None) -> Quantizer:
    return Quantizer(
        side.codebooks,
        side.mean,
        side.scale,
        side.weights,
        side.biases,
        text_width=text_width,
        bridge=bridge,
        kind=kind,
    )


def _write(
    out: Path,
    material: Material,
    frozen: Frozen,
    codes: CodeArray,
    sizes: Sequence[int],
    trained: _Trained,
) -> ScidCodec:
    """Write beside ``out``, then take its place: a reader never finds half a codec."""
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if trained.users is not None:
            trained.users.save(staging / "quantizer" / "users")
        quantizer_hash = ItemEncoder(frozen.text_encoder, trained.quantizer).save(staging / "quantizer")
        codec = ScidCodec(
            material.item_ids,
            codes,
            sizes,
            quantizer_hash=quantizer_hash,
            user_sizes=() if trained.users is None else trained.users.quantizer.sizes,
            vectors=None if trained.users is None else frozen.items,
        )
        codec.save(staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ScidCodec.load(out)
