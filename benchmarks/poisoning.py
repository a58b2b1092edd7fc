"""A poisoned stream: some clients forge likes for chosen items; what that does to these items' exposure.

    python benchmarks/poisoning.py [--seeds 5] [--rounds 4] [--share 0.05] [--targets 20] [--json]

The demo world, small, through the product's own rounds. All arms of a seed share world, base policy and
draws, and request ids are signed in all. *clean*: nobody forges. *defended*: signatures are asked for and
``features.trust`` takes word only from who was served. *open*: everything that lands is learned from.
*votes*: defended, and the forgers also like every target that they were truly shown, which no check can tell
from a user's own mind. In each round each forger, beside being the user that it is in *clean*, likes every
target in the ways of WAYS. Every candidate is promoted, for the gate is another defence (``--gate`` leaves
it on).

Exposure: targets' share of the places on the judges' best slates. ``rise``: mean exposure after the last
round over that of the clean arm, minus 1, with a 95% bootstrap interval over seeds. ``as_clean``: whether
each round learned from the very dataset (by its hash) that the clean arm's learned from.

``--json``: the last line is one object for benchmarks/results/poisoning.json.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from msgspec.structs import replace
from pydantic import SecretStr

from align3gr.console import say
from align3gr.demo.world import WorldSize
from benchmarks.loop.arms import STARTED, Arm, LoopOptions, RoundFigures
from benchmarks.loop.worlds import Ints, Levels, LoopWorld, demo
from benchmarks.measuring import circumstances, clocks, since
from features.interactions import Interaction, Kind
from features.log import FeedbackLog
from features.manifest import read_manifest
from features.requests import sign_request
from features.settings import TrustSettings
from features.trust import marked_feedback

KEY = b"the server's and the workers' key"
CAP = 25
"""Samples of one user in a stage: room for every target, and for all that an honest user likes in a round."""
ARMS = ("clean", "defended", "open", "votes")
WAYS = ("organic", "unsigned", "cross_user", "replayed", "position")
"""Of forging a like: naming no request, one made up, another user's of this round, the forger's own of its
first round (each where the item truly stood, if it did), and the forger's own of this round at a place
where the item did not stand."""


@dataclass(frozen=True)
class Slate:
    """What a user was served in a round."""

    request_id: str
    places: dict[int, int]
    """Place of each item, from 1."""


class PoisonedArm(Arm):
    """An arm whose request ids are signed and some of whose clients forge."""

    def __init__(
        self, name: str, home: Path, world: LoopWorld, options: LoopOptions, wanted: argparse.Namespace
    ) -> None:
        super().__init__(name, home, world, options, say)
        self._gated = wanted.gate
        features = self.settings.features
        if name == "open":
            changed: dict[str, Any] = {"trust": TrustSettings.none()}
        else:
            trust = TrustSettings(
                off_slate=True, max_feedback_age_s=1800.0, organic_until=STARTED + timedelta(minutes=1)
            )
            changed = {"trust": trust, "request_key": SecretStr(KEY.decode())}
        changed["dataset"] = features.dataset.model_copy(
            update={"max_samples_per_user": CAP, "learn_from_unsigned": name == "open"}
        )
        self.settings = self.settings.model_copy(update={"features": features.model_copy(update=changed)})
        random = np.random.default_rng([options.seed, 31])
        learners = len(world.learners)
        self.targets = np.sort(random.permutation(len(world.items))[: wanted.targets])
        forging = 0 if name == "clean" else round(wanted.share * learners)
        self.forgers = np.sort(random.permutation(learners)[:forging])
        self._first: dict[int, Slate] = {}

    def round(self, number: int) -> RoundFigures:
        """A round whose candidate becomes the reference whatever the gate says."""
        figures = super().round(number)
        if self._gated or figures.outcome == "promoted":
            return figures
        self.ledger.promote(
            self.registry.list()[-1].version, expects=self.ledger.reference(), who="benchmark",
            why="what the data alone does",
        )  # fmt: skip
        return figures

    def look(self) -> tuple[float, float]:
        """Share of the places of the judges' best slates that targets hold, and these slates' worth."""
        contexts = [
            self._context(row, list(self.world.past[row]), self.world.met[row]) for row in self.world.judges
        ]
        slates = self._rows_of(self._policy().recommend(contexts, self.world.places))
        return float(np.isin(slates, self.targets).mean()), self.world.worth(slates)

    def datasets(self) -> list[str]:
        """Ids (hashes over the rows) of what the rounds learned from, by round."""
        found = [read_manifest(path.parent) for path in (self.home / "datasets").glob("[!.]*/manifest.json")]
        return [one.dataset_id for one in sorted(found, key=lambda one: one.log_version)]

    def marks(self) -> dict[str, int]:
        """How many rows of the log are not learned from, by mark."""
        snapshot = FeedbackLog.open(self.home / "log", create=False).snapshot()
        found = marked_feedback(snapshot, self.settings.features).column("mark").value_counts()
        return {one["values"]: one["counts"] for one in found.to_pylist()}

    def _serve(
        self, rows: Ints, at: datetime, number: int, random: np.random.Generator
    ) -> tuple[Levels, list[Interaction]]:
        levels, events = super()._serve(rows, at, number, random)
        signed = [
            one
            if one.request_id is None
            else replace(one, request_id=sign_request(KEY, one.request_id, one.user_id))
            for one in events
        ]
        slates = self._slates(signed)
        forgers = np.intersect1d(rows, self.forgers).tolist()
        for place, row in enumerate(forgers):
            victim = int(rows[(np.searchsorted(rows, row) + 1 + place) % len(rows)])
            signed += self._forged(row, slates[row], slates[victim], at, number)
        return levels, signed

    def _slates(self, events: list[Interaction]) -> dict[int, Slate]:
        """By row of the user."""
        user_rows = {self.world.user_id(row): row for row in self.world.learners}
        found: dict[int, Slate] = {}
        for one in events:
            if one.kind == Kind.SERVED and one.request_id is not None and one.position is not None:
                slate = found.setdefault(user_rows[one.user_id], Slate(one.request_id, {}))
                slate.places[self._row[one.item_id]] = one.position
        return found

    def _forged(
        self, row: int, own: Slate, others: Slate, at: datetime, number: int
    ) -> Iterator[Interaction]:
        """Likes of every target by the forger in ``row``, in every way that it can forge them by now."""
        first = self._first.setdefault(row, own)
        named = {"organic": None, "unsigned": None, "cross_user": others, "replayed": first, "position": own}
        for way in WAYS:
            if way == "replayed" and first is own:
                continue  # nothing is old yet
            slate = named[way]
            for item in self.targets.tolist():
                request = f"{number}-made-up-{row}.{'0' * 32}" if way == "unsigned" else None
                yield self._like(
                    row, item, f"{number}-forged-{way}-{item}", at,
                    request if slate is None else slate.request_id,
                    None if way == "organic" else self._claimed(item, slate, lie=way == "position"),
                )  # fmt: skip
        if self.name == "votes":
            for item in np.intersect1d(list(own.places), self.targets).tolist():
                yield self._like(row, item, f"{number}-vote-{item}", at, own.request_id, own.places[item])

    def _claimed(self, item: int, slate: Slate | None, *, lie: bool) -> int:
        """A place for ``item``: where it stood on ``slate``, or another one."""
        stood = None if slate is None else slate.places.get(item)
        if stood is None:
            return 1 + item % self.world.places
        return 1 + stood % self.world.places if lie else stood

    def _like(
        self, row: int, item: int, event_id: str, at: datetime, request_id: str | None, position: int | None
    ) -> Interaction:
        return Interaction(
            event_id=event_id, user_id=self.world.user_id(row), item_id=self.items[item], kind=Kind.LIKE,
            occurred_at=at + timedelta(minutes=5, seconds=item % 50), request_id=request_id,
            position=position,
        )  # fmt: skip


def main(line: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=401)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.05, help="Of the clients that forge.")
    parser.add_argument("--targets", type=int, default=20)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--learners", type=int, default=300)
    parser.add_argument("--judges", type=int, default=300)
    parser.add_argument("--gate", action="store_true", help="Leave promotion to the gate.")
    parser.add_argument("--epochs", type=int, default=6, help="Of the base policy.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="clean must be first.")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(line)
    if wanted.arms[0] != "clean":
        parser.error("--arms begins with clean: the others are compared with it")
    if not 0 <= wanted.share <= 1 or not 1 <= wanted.targets <= wanted.items:
        parser.error("--share must be in 0..1 and --targets in 1..--items")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started, where, runs = clocks(), circumstances(line), []
    for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
        runs.append(run(seed, wanted))
    arms = {name: summary(name, runs) for name in wanted.arms}
    for name, figures in arms.items():
        rise, low, high = figures["rise"], *figures["rise_95"]
        print(
            f"{name:<9}"
            + " ".join(f"{value:.4f}" for value in figures["exposure"])
            + f"  rise {rise:+.1%} [{low:+.1%}, {high:+.1%}]"
        )
    if wanted.json:
        facts = {**where, **since(started), "arms": arms, "runs": runs}
        print(json.dumps(facts))


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's means over seeds, and its rise over the clean arm's with an interval."""
    last = np.array([[one[name]["exposure"][-1], one["clean"]["exposure"][-1]] for one in runs])
    drawn = np.random.default_rng(0).integers(len(runs), size=(10_000, len(runs)))
    resampled = last[drawn].mean(axis=1)
    low, high = np.quantile(resampled[:, 0] / resampled[:, 1] - 1, [0.025, 0.975])
    return {
        "exposure": np.mean([one[name]["exposure"] for one in runs], axis=0).round(5).tolist(),
        "worth": np.mean([one[name]["worth"] for one in runs], axis=0).round(5).tolist(),
        "rise": round(float(last[:, 0].mean() / last[:, 1].mean() - 1), 4),
        "rise_95": [round(float(low), 4), round(float(high), 4)],
        "rounds_as_clean": sum(sum(one[name]["as_clean"]) for one in runs),
    }


def run(seed: int, wanted: argparse.Namespace) -> dict[str, Any]:
    """All arms under one seed."""
    world = demo(seed, WorldSize(items=wanted.items, learners=wanted.learners, evaluated=wanted.judges))
    options = LoopOptions(seed, rounds=wanted.rounds, served=wanted.learners, sft_epochs=wanted.epochs)
    place = Path(tempfile.mkdtemp(prefix="poisoning-"))
    found: dict[str, Any] = {}
    learned: dict[str, list[str]] = {}
    try:
        started = Arm("rfdpo", place / "base", world, options, say)
        started.begin()
        for name in wanted.arms:
            arm = PoisonedArm(name, place / name, world, options, wanted)
            arm.begin_as(started)
            looks, rounds = [arm.look()], []
            for number in range(1, wanted.rounds + 1):
                rounds.append(arm.round(number))
                looks.append(arm.look())
                say(f"{seed} {name} {number}: targets hold {looks[-1][0]:.4f}, worth {looks[-1][1]:.4f}")
            learned[name] = arm.datasets()
            found[name] = {
                "exposure": [round(exposure, 5) for exposure, _ in looks],
                "worth": [round(worth, 5) for _, worth in looks],
                "outcomes": [one.outcome for one in rounds],
                "samples": [one.samples for one in rounds],
                "marks": arm.marks(),
                "as_clean": [
                    one == other for one, other in zip(learned[name], learned["clean"], strict=True)
                ],
            }
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {"seed": seed, **found}


if __name__ == "__main__":
    main()
