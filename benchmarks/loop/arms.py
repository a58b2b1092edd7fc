"""The product's own loop in a world with known truth, without Kafka: serve, react, land, one round, judge.

Two arms differ in the loss alone. *rfdpo* runs the rounds as they are. *sft_likes* runs the same rounds (same
datasets, samples, steps, learning rate and gate) with a loss that is the chosen item's negative
log-likelihood and nothing else: SFT refreshed on likes. Each arm serves its own policy and hears what users
make of that; both start from the same base policy.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from align3gr.demo.defaults import DemoOptions, demo_settings
from benchmarks.landing import land
from features.catalogue import Catalogue
from features.duck import connect
from features.histories import histories
from features.interactions import Interaction, Kind
from features.log import FeedbackLog
from policies.ledger import PromotionLedger
from policies.lists import Recommendation, UserContext
from policies.registry import Registry
from policies.settings import RegistrySettings
from trainer.rounds import start_round
from trainer.settings import StageSettings
from trainer.sft.base_policy import train_sft
from trainer.tokenization import fit_codec
from trainer.workplace import Workplace

from .worlds import UNSEEN, Ints, Levels, LoopWorld

STARTED = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
NO_PULL = 1e-9
"""A beta at which Softmax-DPO has no gradient left: what remains is the anchor."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class LoopOptions:
    """Sizes of a loop, beside its world."""

    seed: int
    rounds: int = 8
    served: int = 2000
    """Learners that get a slate in a round, drawn anew each round."""
    sampled: float = 0.5
    """Share of slates that are sampled, with propensity; the others are the policy's best."""
    sft_epochs: int = 6
    stage: tuple[tuple[str, Any], ...] = (("beta", 4.0), ("learning_rate", 2e-3), ("epochs", 1))
    """What all stages share, as StageSettings names it."""


@dataclass(frozen=True)
class RoundFigures:
    """What one round came to."""

    worth: float
    """Liked rate of the reference after it, on the judges."""
    candidate: float
    """Liked rate of what the round trained, promoted or not: whether the gate was right."""
    online: float
    """Liked rate of what was served in it."""
    outcome: str
    """promoted, held or refused."""
    samples: dict[str, int]
    """Samples each stage learned from."""


class Arm:
    """One home directory that serves and learns. ``base``: a finished home to start from."""

    def __init__(self, name: str, home: Path, world: LoopWorld, options: LoopOptions, tell: Tell) -> None:
        self.name, self.home, self.world, self.options, self._tell = name, home, world, options, tell
        given = demo_settings(home, DemoOptions(options.seed, sft_epochs=options.sft_epochs), window_s=1800.0)
        preference = given.trainer.preference.model_copy(update={"stages": tuple(self._stages())})
        self.settings = given.model_copy(
            update={
                "policies": given.policies.model_copy(update={"registry": RegistrySettings(mlflow=False)}),
                "trainer": given.trainer.model_copy(update={"preference": preference}),
            }
        )
        self.registry = Registry(home, self.settings.policies.registry)
        self.ledger = PromotionLedger(home / "ledger")
        self.items = [item.item_id for item in world.items]
        self._row = {item: row for row, item in enumerate(self.items)}
        learners = len(world.learners)
        self._met = world.met[:learners].copy()
        self._histories = [list(world.past[row]) for row in world.learners]

    def _stages(self) -> Iterator[StageSettings]:
        for data in ("easy", "hard"):
            stage = StageSettings.model_validate({"name": data, "data": data, **dict(self.options.stage)})
            if self.name == "sft_likes":
                stage = stage.model_copy(update={"beta": NO_PULL, "anchor": 1.0})
            yield stage

    def begin(self) -> None:
        """Catalogue, the past, SCIDs and the base policy as first reference."""
        Catalogue.open(self.home / "catalogue").load(list(self.world.items), now=STARTED)
        self._land(self._past(), STARTED)
        with connect(self.settings.features) as con:
            snapshot = FeedbackLog.open(self.home / "log", create=False).snapshot()
            past = histories(con, snapshot, self.settings.features).column("item_ids").to_pylist()
        items = Catalogue.open(self.home / "catalogue").items(listed_only=True)
        trainer, staging = self.settings.trainer, self.home / "policies" / ".staging-base"
        codes = 128 if len(self.items) > 1000 else None
        tokenization = trainer.tokenization.model_copy(update={"codes": codes})
        fit_codec(items, past, tokenization, self.home / "codec", seed=self.options.seed)
        staging.parent.mkdir(parents=True, exist_ok=True)
        train_sft(
            self.home / "codec", past, trainer.sft, staging, texts=[one.text for one in self.world.items]
        )
        version = self.registry.register(staging, round_id="base")
        self.ledger.promote(version, expects=None, who="benchmark", why="the base policy, trained by SFT")

    def begin_as(self, other: "Arm") -> None:
        """The start of another arm."""
        shutil.copytree(other.home, self.home)

    def round(self, number: int) -> RoundFigures:
        """Serve, react, land, learn, judge."""
        random = np.random.default_rng([self.options.seed, 12, number])
        learners = len(self.world.learners)
        rows = np.sort(random.permutation(learners)[: self.options.served])
        at = STARTED + number * HOUR
        levels, events = self._serve(rows, at, number, random)
        self._land(events, at + HOUR / 4)
        workplace = Workplace(
            self.home, self.settings.features, self.settings.policies, self.settings.trainer,
            clock=lambda: at + HOUR / 2,
        )  # fmt: skip
        state = start_round(workplace)
        stages = {stage.name: state.steps[stage.name] for stage in self.settings.trainer.preference.stages}
        figures = RoundFigures(
            worth=self.judge(),
            candidate=self.judge(state.steps["register"]["version"]),
            online=float((levels == 1).mean()),
            outcome=state.outcome or state.status,
            samples={name: int(facts.get("samples", 0)) for name, facts in stages.items()},
        )
        self._tell(
            f"{self.name} round {number}: judged {figures.worth:.4f}, "
            f"candidate {figures.candidate:.4f}, online {figures.online:.4f}, "
            f"{figures.outcome} {figures.samples} {state.steps['gate']['why']}"
        )
        return figures

    def judge(self, version: str | None = None) -> float:
        """Liked rate of a policy's best slates for the judges; none: the reference's."""
        contexts = [
            self._context(row, list(self.world.past[row]), self.world.met[row]) for row in self.world.judges
        ]
        lists = self._policy(version).recommend(contexts, self.world.places)
        return self.world.worth(self._rows_of(lists))

    def likes(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Learners who like each item, as far as the loop has heard, [items]."""
        counts = np.zeros(len(self.items))
        for history in self._histories:
            counts[history] += 1
        return counts

    def _serve(
        self, rows: Ints, at: datetime, number: int, random: np.random.Generator
    ) -> tuple[Levels, list[Interaction]]:
        policy = self._policy()
        contexts = [self._context(row, self._histories[row], self._met[row]) for row in rows.tolist()]
        lists: list[list[Recommendation]] = [[] for _ in contexts]
        explore = random.random(len(contexts)) < self.options.sampled
        sampled, best = np.flatnonzero(explore).tolist(), np.flatnonzero(~explore).tolist()
        seed = int(np.random.default_rng([self.options.seed, 13, number]).integers(2**31))
        drawn = policy.sample([contexts[place] for place in sampled], self.world.places, seed=seed)
        ranked = policy.recommend([contexts[place] for place in best], self.world.places)
        for place, found in [*zip(sampled, drawn, strict=True), *zip(best, ranked, strict=True)]:
            lists[place] = found
        slates = self._rows_of(lists)
        levels = self.world.react(rows, slates, random)
        events = []
        for place, row in enumerate(rows.tolist()):
            events += list(self._events(row, lists[place], levels[place], policy.version, at, number))
            seen = levels[place] > UNSEEN
            self._met[row, slates[place][seen]] = True
            self._histories[row] += slates[place][levels[place] == 1].tolist()
        return levels, events

    def _events(
        self, row: int, found: list[Recommendation], levels: Levels, version: str, at: datetime, number: int
    ) -> Iterator[Interaction]:
        """Served, impressions and answers of one slate; who neither likes nor dislikes gives no answer."""
        stem, user = f"{number}-{row}", self.world.user_id(row)
        about: dict[str, Any] = {"user_id": user, "request_id": stem, "policy_version": version}
        for one in found:
            propensity = None if one.propensity is None else min(1.0, max(one.propensity, 1e-300))
            yield Interaction(
                event_id=f"{stem}-s{one.position}", item_id=one.item_id, kind=Kind.SERVED, occurred_at=at,
                position=one.position, propensity=propensity, **about,
            )  # fmt: skip
        answers = {1: Kind.LIKE, -1: Kind.DISLIKE}
        for one, level in zip(found, levels.tolist(), strict=True):
            if level == UNSEEN:
                continue
            when = at + timedelta(seconds=one.position)
            for kind in (Kind.IMPRESSION, *([answers[level]] if level in answers else [])):
                yield Interaction(
                    event_id=f"{stem}-{kind.value}{one.position}", item_id=one.item_id, kind=kind,
                    occurred_at=when, position=one.position, **about,
                )  # fmt: skip
                when += timedelta(milliseconds=1)

    def _past(self) -> Iterator[Interaction]:
        for row in self.world.learners:
            for place, item in enumerate(self.world.past[row]):
                when = STARTED - timedelta(days=30) + place * HOUR
                yield Interaction(
                    event_id=f"past-{row}-{place}", user_id=self.world.user_id(row),
                    item_id=self.items[item], kind=Kind.LIKE, occurred_at=when,
                )  # fmt: skip

    def _land(self, events: Iterable[Interaction], until: datetime) -> None:
        land(self.home / "log", events, self.settings.features, until)

    def _policy(self, version: str | None = None) -> Any:
        from policies.policy import Policy

        version = version or self.ledger.reference()
        assert version is not None
        return Policy.load(self.registry.path(version), settings=self.settings.policies.decoding)

    def _context(self, row: int, history: list[int], met: np.ndarray[Any, np.dtype[np.bool_]]) -> UserContext:
        seen = frozenset(self.items[item] for item in np.flatnonzero(met).tolist())
        return UserContext(self.world.user_id(row), tuple(self.items[item] for item in history), seen)

    def _rows_of(self, lists: list[list[Recommendation]]) -> Ints:
        rows = np.full((len(lists), self.world.places), -1, dtype=np.int64)
        for place, found in enumerate(lists):
            rows[place, : len(found)] = [self._row[one.item_id] for one in found]
        return rows
