"""What a codec is fitted on: the catalogue, the training histories, and a frozen text and behaviour vector of
each item. An item without behaviour has the one that its text predicts (``Frozen.bridge``).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from policies.quantizer import TextEncoder
from policies.users import InterestAttention, ItemVectors, pooled
from trainer.checkpoint import Checkpoint
from trainer.errors import CannotTrain
from trainer.settings import TokenizationSettings

from .collaborative import collaborative_embeddings
from .din import Collaborative, DinTraining, train_din
from .interactions import IntArray, Interactions
from .text import embed, fit_text_encoder, item_texts, require_text

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


@dataclass(frozen=True)
class FitRun:
    """How one fit runs: its settings, and what is not a setting."""

    settings: TokenizationSettings
    seed: int
    device: str
    progress: Progress
    checkpoints: Path | None
    """Folder for the states of an interrupted fit; none: nothing is kept."""
    key: str
    """Names this fit by all that determines it."""

    def checkpoint(self, name: str) -> Checkpoint:
        """Of one training of this fit."""
        return Checkpoint(None if self.checkpoints is None else self.checkpoints / name, self.key)


@dataclass(frozen=True)
class Material:
    """Catalogue and training histories as all that follows takes them."""

    item_ids: list[str]
    texts: list[str]
    """Of each item; empty where it has none."""
    histories: list[IntArray]
    """Rows of the items each user met, oldest first."""

    @classmethod
    def of(
        cls, items: pa.Table, histories: Sequence[Sequence[str]], settings: TokenizationSettings
    ) -> "Material":
        """Raises CannotTrain for an empty catalogue, MissingText as the settings say."""
        item_ids = [str(item_id) for item_id in items.column("item_id").to_pylist()]
        if not item_ids:
            raise CannotTrain("the catalogue is empty; load items with `align3gr catalogue load FILE`")
        texts = item_texts(items)
        if settings.without_text == "refuse":
            require_text(item_ids, texts)
        row_of = {item_id: row for row, item_id in enumerate(item_ids)}
        rows = [
            np.array([row_of[item] for item in history if item in row_of], dtype=np.int64)
            for history in histories
        ]
        return cls(item_ids, texts, rows)

    def key(self, settings: TokenizationSettings, seed: int, device: str) -> str:
        """Names a fit on this by all that determines it."""
        digest = hashlib.sha256(settings.model_dump_json().encode())
        digest.update(f"{seed}\0{device}\0".encode())
        digest.update(json.dumps([self.item_ids, self.texts], ensure_ascii=False).encode())
        for history in self.histories:
            digest.update(len(history).to_bytes(8, "little") + history.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Frozen:
    """The vectors that everything else is trained on."""

    text_encoder: TextEncoder
    interactions: Interactions
    attention: InterestAttention | None
    """How a user's interest is pooled; none: a plain mean."""
    known: npt.NDArray[np.bool_]
    """[n] which items have behaviour of their own."""
    bridge: FloatArray
    """[text width + 1, d] behaviour from [text, 1]."""
    predicted: FloatArray
    """[n, d] each item's behaviour as its text predicts it."""
    items: ItemVectors
    vectors: FloatArray
    """[n, text width + d] text and behaviour side by side."""
    enough: bool
    """Whether there are pairs enough to align users and items by."""

    def user_vectors(self, places: IntArray) -> FloatArray:
        """[len(places), text width + d] of the users as they stood before these interactions."""
        chunks = [
            pooled(self.items, self.attention, self.interactions.before(places[start : start + 4096]))
            for start in range(0, len(places), 4096)
        ]
        return np.concatenate([np.empty((0, self.vectors.shape[1]), np.float32), *chunks])


def freeze(material: Material, run: FitRun, *, embeddings: Path | None = None) -> Frozen:
    """Encode the texts, learn behaviour from the histories, and bridge the two.

    ``embeddings``: folder where a sentence encoder's vectors are kept.
    """
    settings, say = run.settings, run.progress
    say("text", 0, 1)
    encoder: TextEncoder = fit_text_encoder(
        material.texts,
        directory=settings.text_encoder,
        dimension=settings.text_dimension,
        vocabulary=settings.vocabulary,
        ngrams=settings.ngrams,
    )
    text = embed(encoder, material.texts, embeddings, lambda done, of: say("text", done, of))
    interactions = Interactions.of(material.histories, len(material.item_ids), seed=run.seed)
    enough = len(interactions.pairs) >= settings.alignment.min_pairs
    found = _collaborative(interactions, len(material.item_ids), run, enough=enough)
    known = np.linalg.norm(found.items, axis=1) > 0
    bridge = _bridge(text, found.items, known)
    predicted = (text @ bridge[:-1] + bridge[-1]).astype(np.float32)
    # Rounded as the codec keeps them, so that a user's codes are the same before and after it is saved.
    items = ItemVectors.of(text, np.where(known[:, None], found.items, predicted))
    vectors = np.concatenate([items.text, items.behaviour], axis=1)
    return Frozen(
        encoder, interactions, found.attention, known, bridge, predicted, items, vectors, enough=enough
    )


def _collaborative(interactions: Interactions, n_items: int, run: FitRun, *, enough: bool) -> Collaborative:
    to, say = run.settings.collaborative, run.progress
    say("behaviour", 0, 1)
    if to.method == "none":
        return Collaborative(np.zeros((n_items, 0), dtype=np.float32), None)
    if to.method == "ppmi" or not enough:
        vectors = collaborative_embeddings(
            interactions.shown(), n_items, dimension=to.dimension or 64, window=to.window, shift=to.shift
        )
        return Collaborative(vectors, None)
    training = DinTraining(
        dimension=to.dimension or 32,
        attention=to.attention,
        epochs=to.epochs,
        batch=to.batch_size,
        negatives=to.negatives,
        learning_rate=to.learning_rate,
    )
    return train_din(
        interactions,
        training,
        seed=run.seed,
        device=run.device,
        checkpoint=run.checkpoint("din"),
        progress=lambda done, of: say("behaviour", done, of),
    )


def _bridge(text: FloatArray, behaviour: FloatArray, known: npt.NDArray[np.bool_]) -> FloatArray:
    """Ridge regression of behaviour on [text, 1] over the items that have both: [text width + 1, d]."""
    ones = np.ones((len(text), 1), dtype=np.float32)
    inputs = np.concatenate([text, ones], axis=1)[known].astype(np.float64)
    ridge = np.eye(inputs.shape[1]) * max(1e-2 * len(inputs), 1.0)
    solution = np.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ behaviour[known])
    return np.asarray(solution, dtype=np.float32)
