"""Ranking models by name: fitted on training histories alone, each asked for scores over the catalogue.

SASRec and the rules are the product's own (trainer.sft), the factor models come from libraries in an
environment of their own (factors.py), the rest is here. A fitted model is used by every row that needs it.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np

from trainer.metrics import FloatArray, IntArray, RankingModel
from trainer.settings import SasRecSettings, TeacherShares
from trainer.sft.sasrec import SasRec
from trainer.sft.teacher import Part, parts_of
from trainer.sft.votes import sequential_rules

from .simple import ItemKnn, Popularity

SASREC_SHARE = 0.6
"""SASRec's share of the mixture, as in the lab's."""
FUSION = (2.0, 20.0)
"""(a, b) of the log-linear fusion log p + a log(1 + b s), as in the lab's."""


class RowUnavailableError(Exception):
    """A row that cannot be run here; the message says why."""


@dataclass
class Shelf:
    """Models fitted on one data set, each once a seed."""

    training: Sequence[IntArray]
    n_items: int
    sasrec: SasRecSettings
    shares: TeacherShares
    """What the teacher is made of."""
    texts: Sequence[str] = ()
    """One an item, for the teacher."""
    later: int = 0
    """Items at the end of a history that is asked about which training did not see."""
    device: str = "cpu"
    python: str | None = None
    """Python of the environment that holds the libraries of factors.py."""
    _fitted: dict[tuple[str, int], tuple[RankingModel, float]] = field(default_factory=dict)

    def model(self, name: str, seed: int) -> tuple[RankingModel, float]:
        """(the model, seconds it took to fit with all that it is made of). Raises RowUnavailableError."""
        if (name, seed) not in self._fitted:
            began = time.perf_counter()
            made = MODELS[name](self, seed)
            self._fitted[name, seed] = made, time.perf_counter() - began
        model, seconds = self._fitted[name, seed]
        parts = [one for one in PARTS.get(name, ()) if (one, seed) in self._fitted]
        return model, max([seconds, sum(self._fitted[part, seed][1] for part in parts)])


@dataclass(frozen=True)
class LogProbs:
    """SASRec as a ranking model."""

    sasrec: SasRec

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """log p, float32 [n, n_items]."""
        return self.sasrec.log_probs(histories)


@dataclass(frozen=True)
class Mixture:
    """``sigma p + (1 - sigma) s / sum(s)``: SASRec's probabilities and the rules', mixed plainly."""

    first: RankingModel
    rules: RankingModel
    sigma: float = SASREC_SHARE

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]."""
        rules = _scaled(self.rules.scores(histories))
        return self.sigma * np.exp(self.first.scores(histories)) + (1 - self.sigma) * rules


@dataclass(frozen=True)
class Fusion:
    """``log p + a log(1 + b s)``: the rules lift what SASRec holds for possible."""

    first: RankingModel
    rules: RankingModel

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]."""
        a, b = FUSION
        found = self.first.scores(histories) + a * np.log1p(b * self.rules.scores(histories))
        return np.asarray(found, dtype=np.float32)


@dataclass(frozen=True)
class Blend:
    """What our policies are taught (trainer/sft/teacher.py): parts with shares, each scaled to sum to 1 over
    items not met."""

    parts: Sequence[tuple[float, Part]]

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]."""
        shares = [share for share, _ in self.parts]
        found = [_scaled(part.scores(histories)) for _, part in self.parts]
        return np.asarray(np.tensordot(shares, found, axes=1), dtype=np.float32)


def _scaled(scores: FloatArray) -> FloatArray:
    return np.asarray(scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-30), dtype=np.float32)


@dataclass(frozen=True)
class Factors:
    """``s(u, j) = U_u . V_j``. The history names the user, whose factors were learned in training."""

    users: FloatArray
    items: FloatArray
    row: dict[bytes, int]
    """The user's training history as bytes -> row of ``users``."""
    later: int
    """Items at the end of a history that training did not see."""

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items]."""
        rows = [self.row[history[: len(history) - self.later].tobytes()] for history in histories]
        return np.asarray(self.users[rows] @ self.items.T, dtype=np.float32)


def _factors(method: str) -> Callable[[Shelf, int], RankingModel]:
    def fit(shelf: Shelf, seed: int) -> RankingModel:
        if shelf.python is None:
            raise RowUnavailableError(
                "give --python, an environment with the libraries of baselines/factors.py"
            )
        program = Path(__file__).with_name("factors.py")
        with tempfile.TemporaryDirectory() as place:
            given, found = Path(place) / "given.npz", Path(place) / "found.npz"
            np.savez(
                given,
                users=np.repeat(np.arange(len(shelf.training)), [len(one) for one in shelf.training]),
                items=np.concatenate(shelf.training),
                shape=np.array([len(shelf.training), shelf.n_items]),
            )
            command = [shelf.python, str(program), method, str(given), str(found), str(seed)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RowUnavailableError(" ".join(done.stderr.split())[-200:])
            with np.load(found) as arrays:
                users, items = arrays["users"], arrays["items"]
        rows = {one.tobytes(): row for row, one in enumerate(shelf.training)}
        return Factors(users, items, rows, shelf.later)

    return fit


def _blend(shelf: Shelf, seed: int) -> RankingModel:
    def sasrec() -> SasRec:
        return cast(LogProbs, shelf.model("sasrec", seed)[0]).sasrec

    texts = shelf.texts or [""] * shelf.n_items
    return Blend(parts_of(shelf.shares, shelf.training, shelf.n_items, texts=texts, sasrec=sasrec))


PARTS = {"mixture": ("sasrec", "rules"), "fusion": ("sasrec", "rules"), "teacher": ("sasrec",)}

MODELS: dict[str, Callable[[Shelf, int], RankingModel]] = {
    "popularity": lambda shelf, _: Popularity(shelf.training, shelf.n_items),
    "itemknn": lambda shelf, _: ItemKnn(shelf.training, shelf.n_items),
    "rules": lambda shelf, _: sequential_rules(shelf.training, shelf.n_items),
    "sasrec": lambda shelf, seed: LogProbs(
        SasRec.fit(
            shelf.training,
            shelf.n_items,
            shelf.sasrec.model_copy(update={"seed": seed}),
            device=shelf.device,
            progress=_said,
        )
    ),
    "mixture": lambda shelf, seed: Mixture(shelf.model("sasrec", seed)[0], shelf.model("rules", seed)[0]),
    "fusion": lambda shelf, seed: Fusion(shelf.model("sasrec", seed)[0], shelf.model("rules", seed)[0]),
    "teacher": _blend,
    "als": _factors("als"),
    "bpr": _factors("bpr"),
}


def _said(epoch: int, epochs: int, loss: float, quality: float) -> None:
    print(f"  sasrec {epoch}/{epochs} loss {loss:.3f} ndcg@10 {quality:.4f}", file=sys.stderr, flush=True)
