"""Candidates of known worth before the real gate: policies are tables of scores in a world whose truth is
known.

The reference is the truth, blurred. A candidate changes it by one kind of mistake (or repair) whose strength
is found by bisection, so that its *true worth*, the expected liked places of its lists over all users of the
world, moves by exactly what was asked. A run draws gate users, lets the reference serve them sampled slates,
draws their reactions and their organic likes, and measures both policies on these as trainer/evaluation.py
does: the gate sees nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from align3gr.demo.past import top
from benchmarks.loop.worlds import UNSEEN, Floats, Ints, LoopWorld
from policies.gate import GateInput, PolicyFigures
from trainer.metrics import ListShape

SLATES = 3
"""Sampled slates of a gate user."""
ORGANIC = 2
"""Likes of a gate user that no policy selected."""
NEW_SHARE = 0.2
"""The fifth of the users with the shortest past is new, the tenth with the longest is heavy."""
YOUNG_SHARE = 0.2

Change = Callable[[Ints, float, np.random.Generator], Floats]


@dataclass(frozen=True)
class Log:
    """What gate users did with the reference's slates, and on their own."""

    rows: Ints
    """[n] users of the world."""
    slates: Ints
    """[n * SLATES, places] items."""
    levels: np.ndarray
    """[n * SLATES, places] as ``LoopWorld.react`` gives them."""
    organic: Ints
    """[n, ORGANIC] items."""


class TrialWorld:
    """A world, its reference policy, and candidates of known worth."""

    def __init__(self, world: LoopWorld, seed: int, *, blur: float = 1.5) -> None:
        self.world, self.seed = world, seed
        random = np.random.default_rng([seed, 21])
        truth = np.log(np.clip(world.liked, 0.01, 0.99) / (1 - np.clip(world.liked, 0.01, 0.99)))
        self.truth = (truth - truth.mean()) / truth.std()
        self.reference = self.truth + blur * random.standard_normal(truth.shape)
        self.reference /= self.reference.std()
        self.sharpness = float((self.reference * self.truth).mean())
        self.young = random.random(truth.shape[1]) < YOUNG_SHARE
        lengths = np.array([len(past) for past in world.past])
        order = np.argsort(lengths + 0.5 * random.random(len(lengths)))
        self.new = np.zeros(len(lengths), dtype=bool)
        self.new[order[: int(NEW_SHARE * len(order))]] = True
        self.heavy = np.zeros(len(lengths), dtype=bool)
        self.heavy[order[int(0.9 * len(order)) :]] = True
        counts = np.bincount(
            np.concatenate([np.array(p, dtype=np.int64) for p in world.past]), minlength=len(self.young)
        )
        self.order = np.argsort(-counts, kind="stable")
        self.popularity = (counts - counts.mean()) / counts.std()
        self.decile = np.empty(len(counts), dtype=np.int64)
        self.decile[self.order] = 10 - (np.arange(len(counts)) * 10) // len(counts)

    def worth(
        self, scores: Floats, *, users: np.ndarray | None = None, items: np.ndarray | None = None
    ) -> float:
        """Expected liked places of the best lists; of ``users`` only, counting ``items`` only, if given."""
        rows = np.arange(len(scores)) if users is None else np.flatnonzero(users)
        lists = top(np.where(self.world.met[rows], -np.inf, scores[rows]), self.world.places)
        liked = self.world.liked[rows[:, None], lists] * self.world.looked
        return float((liked * (items[lists] if items is not None else 1.0)).sum(axis=1).mean())

    @cached_property
    def reference_worth(self) -> float:
        """Of the reference."""
        return self.worth(self.reference)

    def changes(self) -> dict[str, Change]:
        """Kind -> (users, strength 0..1, random) -> the candidate's scores for them."""

        def noise(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            scores = self.reference[rows]
            return (1 - strength) * scores + strength * random.standard_normal(scores.shape)

        def inverted(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            jitter = 0.1 * random.standard_normal((len(rows), len(self.young)))
            return self.reference[rows] - 2.0 * strength * (self.truth[rows] + jitter)

        def popular(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            jitter = 0.05 * random.standard_normal((len(rows), len(self.young)))
            return (1 - strength) * self.reference[rows] + strength * (self.popularity + jitter)

        def new_users(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            changed = self.reference[rows]
            new = self.new[rows]
            changed[new] = noise(rows[new], strength, random)
            return changed

        def young_items(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            changed = self.reference[rows] + 0.02 * random.standard_normal((len(rows), len(self.young)))
            changed[:, self.young] -= 4.0 * strength
            return changed

        def better(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            jitter = 0.1 * random.standard_normal((len(rows), len(self.young)))
            return self.reference[rows] + 2.0 * strength * (self.truth[rows] + jitter)

        def retrained(rows: Ints, strength: float, random: np.random.Generator) -> Floats:
            return self.twin(rows, random) + 2.0 * strength * self.truth[rows]

        return {
            "noise": noise,
            "inverted": inverted,
            "popular": popular,
            "new users": new_users,
            "young items": young_items,
            "better": better,
            "better, retrained": retrained,
        }

    def loss(self, kind: str, scores: Floats) -> float:
        """Share of its true worth that the reference has more, where this kind of harm is felt."""
        about = {"new users": {"users": self.new}, "young items": {"items": self.young}}.get(kind, {})
        return 1.0 - self.worth(scores, **about) / self.worth(self.reference, **about)

    def strength(self, kind: str, loss: float) -> float | None:
        """The strength at which the loss is ``loss`` (negative: a gain), by bisection; none out of reach."""
        change, everybody = self.changes()[kind], np.arange(len(self.reference))
        low, high = 0.0, 1.0
        for step in range(11):
            middle = high if step == 0 else (low + high) / 2
            found = self.loss(kind, change(everybody, middle, np.random.default_rng([self.seed, 22])))
            reached = found <= loss if loss < 0 else found >= loss
            if step == 0 and not reached:
                return None
            if step:
                low, high = (low, middle) if reached else (middle, high)
        return high

    def twin(self, rows: Ints, random: np.random.Generator, *, share: float = 0.1) -> Floats:
        """Another policy of the same worth: the truth with partly another blur of the same size."""
        truth, reference = self.truth[rows], self.reference[rows]
        blur = reference - truth * self.sharpness
        other = random.standard_normal(blur.shape) * blur.std()
        return truth * self.sharpness + np.sqrt(1 - share) * blur + np.sqrt(share) * other

    def log(self, users: int, random: np.random.Generator, *, temperature: float = 0.5) -> Log:
        """Draw gate users, the reference's sampled slates with reactions, and organic likes."""
        rows = random.choice(len(self.reference), users, replace=False)
        each = np.repeat(rows, SLATES)
        noisy = self.reference[each] / temperature + random.gumbel(size=(len(each), self.reference.shape[1]))
        slates = top(np.where(self.world.met[each], -np.inf, noisy), self.world.places)
        levels = self.world.react(each, slates, random)
        wanted = np.log(self.world.liked[rows] + 1e-9) + random.gumbel(size=(users, self.reference.shape[1]))
        organic = top(np.where(self.world.met[rows], -np.inf, wanted), ORGANIC)
        return Log(rows, slates, levels, organic)

    def figures(self, version: str, scores: Floats, log: Log) -> PolicyFigures:
        """What evaluation measures of a policy on the log: ``scores`` [n, items] of the log's users."""
        allowed = np.where(self.world.met[log.rows], -np.inf, scores)
        per_user: dict[str, Floats] = {}
        slices: dict[str, Floats] = {}
        self._slates(scores, log, per_user, slices)
        self._ranking(allowed, log, per_user, slices)
        lists = top(allowed, 10)
        shape = ListShape.of(lists, self.order, depth=10)
        return PolicyFigures(version, per_user, shape.coverage, 1.0, shape.concentration, slices)

    def given(
        self, candidate: Floats, log: Log, *, reference: Floats | None = None, anchor: Floats | None = None
    ) -> GateInput:
        """The gate's input: tables of scores for the log's users, measured on the log."""
        reference = self.reference[log.rows] if reference is None else reference
        return GateInput(
            users=tuple(str(row) for row in log.rows.tolist()),
            candidate=self.figures("candidate", candidate, log),
            reference=self.figures("reference", reference, log),
            anchor=None if anchor is None else self.figures("anchor", anchor, log),
            user_slices={"new users": self.new[log.rows], "heavy users": self.heavy[log.rows]},
        )

    def _item_slices(self, items: Ints) -> list[tuple[str, np.ndarray]]:
        """Slice -> which of ``items`` are in it."""
        deciles = [(f"popularity decile {one}", self.decile[items] == one) for one in range(1, 11)]
        return [("young items", self.young[items]), *deciles]

    def _slates(
        self, scores: Floats, log: Log, per_user: dict[str, Floats], slices: dict[str, Floats]
    ) -> None:
        owner = np.repeat(np.arange(len(log.rows)), SLATES)
        values = np.take_along_axis(scores[owner], log.slates, axis=1)
        liked, other = log.levels == 1, (log.levels != 1) & (log.levels != UNSEEN)
        above = values[:, :, None] - values[:, None, :]
        wins = ((above > 0) + 0.5 * (above == 0)) * other[:, None, :]
        others = other.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = wins.sum(axis=2) / others[:, None]  # [cases, places]: of a liked item over the others
        kept = liked & (others > 0)[:, None]
        rate = _mean_where(each, kept, axis=1)
        per_user["slate"] = _mean_by(owner, rate, len(log.rows))
        for name, inside in self._item_slices(log.slates):
            member = kept & inside
            slices[f"slate/{name}"] = _mean_by(
                np.repeat(owner, each.shape[1]), np.where(member, each, np.nan).ravel(), len(log.rows)
            )

    def _ranking(
        self, allowed: Floats, log: Log, per_user: dict[str, Floats], slices: dict[str, Floats]
    ) -> None:
        mine = np.take_along_axis(allowed, log.organic, axis=1)
        ranks = np.stack([(allowed > mine[:, [one]]).sum(axis=1) + 1 for one in range(ORGANIC)], axis=1)
        gains = np.where(ranks <= 10, 1.0 / np.log2(1.0 + ranks), 0.0)
        per_user["full"] = gains.mean(axis=1)
        owner = np.repeat(np.arange(len(log.rows)), ORGANIC)
        for name, inside in self._item_slices(log.organic):
            slices[f"full/{name}"] = _mean_by(owner, np.where(inside, gains, np.nan).ravel(), len(log.rows))


def _mean_where(values: Floats, kept: np.ndarray, *, axis: int) -> Floats:
    count = kept.sum(axis=axis)
    total = np.where(kept, values, 0.0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _mean_by(owner: Ints, values: Floats, users: int) -> Floats:
    there = ~np.isnan(values)
    count = np.bincount(owner[there], minlength=users)
    total = np.bincount(owner[there], weights=values[there], minlength=users)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927)."""
    z, share = 1.96, hits / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * np.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


KINDS: Sequence[str] = ("noise", "inverted", "popular", "new users", "young items")
