"""Fit a codec: catalogue and training histories in, a codec directory and a report out.

Frozen encoders give every item a text and a behaviour vector; a user's are made of those of the items of the
history. SC encoders bring users beside what they take (U2I), RQ-VAEs turn both into codes, and collisions of
items are resolved so that one SCID is one item. The codec is leak-free by construction: behaviour comes from
the histories it is given and from nowhere else, so the caller leaves out what must not be seen.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from policies.codec import ScidCodec
from policies.quantizer import ItemEncoder, Quantizer, TextEncoder
from policies.users import ItemVectors, UserEncoder, pooled
from trainer.checkpoint import Checkpoint
from trainer.errors import CannotTrain
from trainer.settings import TokenizationSettings

from .collaborative import collaborative_embeddings
from .din import Collaborative, DinTraining, train_din
from .interactions import IntArray, Interactions
from .joint import Inputs, Joint, JointTraining, Side, centre, linear_arrays, train_jointly
from .quality import codebook_perplexity, codebook_use
from .rqvae import RqVaeShape, RqVaeTraining, residual_kmeans, train_rqvae
from .text import embed, fit_text_encoder, item_texts, require_text
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
    collaborative: str
    """"din", "ppmi" or "none"."""
    pairs: int
    """(History, item met next) pairs that were learned from."""
    aligned: bool
    """Whether users and items were brought together by U2I."""
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
    users: int = 0
    """Users with a history, coded as of its end."""
    user_sizes: tuple[int, ...] = ()
    user_codes_distinct: int = 0
    users_sharing: float = 0.0
    """Share of these users whose SCID another one has too."""
    user_use: tuple[float, ...] = ()
    user_perplexity: tuple[float, ...] = ()
    auc: dict[str, float] = field(default_factory=dict)
    """Of held-out pairs: start, switch (of the phases), end, best."""
    recall_at_10: dict[str, float] = field(default_factory=dict)
    """Of the same pairs over the whole catalogue."""
    switched_at: int | None = None
    """Pass over the users after which the weights switched."""

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
    fit = _Fit(items, seen, settings, seed, device, checkpoint, embeddings, progress or (lambda *_: None))
    joint = fit.train()
    codes, residuals = quantize(joint.quantizer, fit.vectors)
    resolved = unique_codes(codes, residuals, joint.quantizer.codebooks[-1])
    codec = _write(out, fit, resolved.codes, resolved.sizes, joint)
    fit.forget()
    user_codes = codec.encode_user_rows([history for history in fit.histories if len(history)])
    coded = user_codes if codec.user_sizes else user_codes[:0]
    report = TokenizationReport(
        items=len(fit.item_ids),
        sizes=resolved.sizes,
        method=settings.method,
        text_encoder=fit.text_encoder.kind,
        collaborative=settings.collaborative.method,
        pairs=len(fit.interactions.pairs),
        aligned=joint.watched is not None,
        items_without_text=sum(not text for text in fit.texts),
        items_without_behaviour=int((~fit.known).sum()),
        collision_rate=resolved.collision_rate,
        moved=resolved.moved,
        use=codebook_use(resolved.codes, resolved.sizes),
        perplexity=codebook_perplexity(resolved.codes),
        quantizer_hash=codec.quantizer_hash,
        item_map_hash=codec.item_map_hash,
        users=len(coded),
        user_sizes=codec.user_sizes,
        **_sharing(coded, codec.user_sizes),
        **_watched(joint.watched),
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


class _Fit:
    """One fit: frozen vectors first, then whatever is trained on them."""

    def __init__(
        self,
        items: pa.Table,
        histories: Sequence[Sequence[str]],
        settings: TokenizationSettings,
        seed: int,
        device: str,
        checkpoint: Path | None,
        embeddings: Path | None,
        say: Progress,
    ) -> None:
        self.settings, self.seed, self.device, self.say = settings, seed, device, say
        self.item_ids = [str(item_id) for item_id in items.column("item_id").to_pylist()]
        if not self.item_ids:
            raise CannotTrain("the catalogue is empty; load items with `align3gr catalogue load FILE`")
        self.texts = item_texts(items)
        if settings.without_text == "refuse":
            require_text(self.item_ids, self.texts)
        self.histories = _indexed(self.item_ids, histories)
        self.checkpoint = checkpoint
        self.key = self._key() if checkpoint is not None else ""

        say("text", 0, 1)
        self.text_encoder: TextEncoder = fit_text_encoder(
            self.texts,
            directory=settings.text_encoder,
            dimension=settings.text_dimension,
            vocabulary=settings.vocabulary,
            ngrams=settings.ngrams,
        )
        self.text = embed(self.text_encoder, self.texts, embeddings, lambda done, of: say("text", done, of))
        self.interactions = Interactions.of(self.histories, len(self.item_ids), seed=seed)
        self.enough = len(self.interactions.pairs) >= settings.alignment.min_pairs
        found = self._collaborative()
        self.attention = found.attention
        self.known = np.linalg.norm(found.items, axis=1) > 0
        self.bridge = _bridge(self.text, found.items, self.known)
        self.predicted = (self.text @ self.bridge[:-1] + self.bridge[-1]).astype(np.float32)
        behaviour = np.where(self.known[:, None], found.items, self.predicted)
        # Rounded as the codec keeps them, so that a user's codes are the same before and after it is saved.
        self.item_vectors = ItemVectors.of(self.text, behaviour)
        self.vectors = np.concatenate([self.item_vectors.text, self.item_vectors.behaviour], axis=1)

    def train(self) -> _Trained:
        """Quantizers of both sides, aligned when there is enough to align by."""
        settings = self.settings
        item_shape = self._shape(codes_for(len(self.item_ids), settings))
        user_shape = None
        if settings.users and self.enough:
            user_shape = self._shape(codes_for(sum(len(history) > 0 for history in self.histories), settings))
        if settings.alignment.method == "u2i" and self.enough:
            return self._jointly(item_shape, user_shape)
        items = self._alone("codes", self.vectors, item_shape, self.seed)
        users = None
        if user_shape is not None:
            rows = self.interactions.before(self.interactions.pairs)
            users = self._alone("user codes", self._user_vectors(rows), user_shape, self.seed + 1)
        return self._trained(items, users, None)

    def forget(self) -> None:
        """The fit has ended: its checkpoints are of no use."""
        if self.checkpoint is not None:
            shutil.rmtree(self.checkpoint, ignore_errors=True)

    def _jointly(self, item_shape: RqVaeShape, user_shape: RqVaeShape | None) -> _Trained:
        to, width = self.settings.alignment, self.settings.alignment.dimension
        joint = train_jointly(
            Inputs(
                self.interactions,
                self.item_vectors,
                self.attention,
                self.predicted,
                self.settings.collaborative.weight,
            ),
            JointTraining(
                hidden=to.hidden,
                width=width,
                epochs=to.epochs,
                patience=to.patience,
                batch=to.batch_size,
                learning_rate=to.learning_rate,
                log_q=to.log_q,
                alpha=to.alpha,
                gamma=to.gamma,
                drop_behaviour=to.drop_behaviour,
                method=self.settings.method,
                quantizer=self._rqvae_training(),
            ),
            replace(item_shape, input_dim=width),
            None if user_shape is None else replace(user_shape, input_dim=width),
            seed=self.seed,
            device=self.device,
            checkpoint=self._checkpoint("joint"),
            progress=self.say,
        )
        return self._trained(joint.items, joint.users, joint)

    def _alone(self, what: str, vectors: FloatArray, shape: RqVaeShape, seed: int) -> Side:
        """Quantize frozen vectors as they are."""
        mean, scale = centre(vectors, self.text.shape[1], self.settings.collaborative.weight)
        scaled = ((vectors - mean) / scale).astype(np.float32)
        if self.settings.method == "rqkmeans":
            books = residual_kmeans(scaled, shape.levels, shape.codes, seed=seed)
            return Side(mean, scale, (), (), tuple(books))
        model = train_rqvae(
            scaled,
            shape,
            self._rqvae_training(),
            seed=seed,
            device=self.device,
            progress=lambda done, of, _: self.say(what, done, of),
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
        coder = None
        if users is not None:
            coder = UserEncoder(_quantizer(users, self.settings.method), self.attention)
        quantizer = _quantizer(items, self.settings.method, text_width=self.text.shape[1], bridge=self.bridge)
        return _Trained(quantizer, coder, watched)

    def _collaborative(self) -> Collaborative:
        to, n_items = self.settings.collaborative, len(self.item_ids)
        self.say("behaviour", 0, 1)
        if to.method == "none":
            return Collaborative(np.zeros((n_items, 0), dtype=np.float32), None)
        if to.method == "ppmi" or not self.enough:
            vectors = collaborative_embeddings(
                self.interactions.shown(),
                n_items,
                dimension=to.dimension or 64,
                window=to.window,
                shift=to.shift,
            )
            return Collaborative(vectors, None)
        return train_din(
            self.interactions,
            DinTraining(
                dimension=to.dimension or 32,
                attention=to.attention,
                epochs=to.epochs,
                batch=to.batch_size,
                negatives=to.negatives,
                learning_rate=to.learning_rate,
            ),
            seed=self.seed,
            device=self.device,
            checkpoint=self._checkpoint("din"),
            progress=lambda done, of: self.say("behaviour", done, of),
        )

    def _user_vectors(self, rows: IntArray) -> FloatArray:
        chunks = [
            pooled(self.item_vectors, self.attention, rows[start : start + 4096])
            for start in range(0, len(rows), 4096)
        ]
        return np.concatenate(chunks)

    def _shape(self, codes: int) -> RqVaeShape:
        return RqVaeShape(
            input_dim=self.vectors.shape[1],
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

    def _checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(None if self.checkpoint is None else self.checkpoint / name, self.key)

    def _key(self) -> str:
        """Names this fit by all that determines it."""
        digest = hashlib.sha256(self.settings.model_dump_json().encode())
        digest.update(f"{self.seed}\0{self.device}\0".encode())
        digest.update(json.dumps([self.item_ids, self.texts], ensure_ascii=False).encode())
        for history in self.histories:
            digest.update(len(history).to_bytes(8, "little") + history.tobytes())
        return digest.hexdigest()


def _indexed(item_ids: Sequence[str], histories: Sequence[Sequence[str]]) -> list[IntArray]:
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    return [
        np.array([index[item] for item in history if item in index], dtype=np.int64) for history in histories
    ]


def _bridge(text: FloatArray, behaviour: FloatArray, known: npt.NDArray[np.bool_]) -> FloatArray:
    """Ridge regression of behaviour on [text, 1] over the items that have both: [text width + 1, d]."""
    inputs = np.concatenate([text, np.ones((len(text), 1), dtype=np.float32)], axis=1)[known].astype(
        np.float64
    )
    ridge = np.eye(inputs.shape[1]) * max(1e-2 * len(inputs), 1.0)
    solution = np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ behaviour[known])
    return np.asarray(solution, dtype=np.float32)


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


def _sharing(codes: CodeArray, sizes: Sequence[int]) -> dict[str, Any]:
    """How users' SCIDs are spread over the users."""
    if not len(codes):
        return {}
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return {
        "user_codes_distinct": len(counts),
        "users_sharing": float(counts[counts > 1].sum() / len(codes)),
        "user_use": codebook_use(codes, sizes),
        "user_perplexity": codebook_perplexity(codes),
    }


def _watched(joint: Joint | None) -> dict[str, Any]:
    """AUC and recall of held-out pairs at the moments that count."""
    if joint is None:
        return {}
    moments = {"start": joint.start, "switch": joint.switch, "end": joint.end, "best": joint.best}
    return {
        "auc": {name: watched.auc for name, watched in moments.items()},
        "recall_at_10": {name: watched.recall_at_10 for name, watched in moments.items()},
        "switched_at": joint.switched_at,
    }


def _write(out: Path, fit: _Fit, codes: CodeArray, sizes: Sequence[int], trained: _Trained) -> ScidCodec:
    """Write beside ``out``, then take its place: a reader never finds half a codec."""
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        if trained.users is not None:
            trained.users.save(staging / "quantizer" / "users")
        quantizer_hash = ItemEncoder(fit.text_encoder, trained.quantizer).save(staging / "quantizer")
        codec = ScidCodec(
            fit.item_ids,
            codes,
            sizes,
            quantizer_hash=quantizer_hash,
            user_sizes=() if trained.users is None else trained.users.quantizer.sizes,
            vectors=None if trained.users is None else fit.item_vectors,
        )
        codec.save(staging)
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ScidCodec.load(out)
