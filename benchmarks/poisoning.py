"""A poisoned stream: some clients forge likes for chosen items; what that does to these items' exposure.

    python benchmarks/poisoning.py [--seeds 1] [--rounds 4] [--share 0.05] [--targets 20] [--json]

The demo world, small, through the product's own rounds. Arms: *clean*, nobody forges; *open*, everything
that lands is learned from; *defended*, request ids are signed and ``features.trust`` takes word only from who
was served. All start from the same base policy. In every round each forging client, beside being a user like
any other, likes every target in five ways: without a request, under its own signed request of the round,
under its first one, another user's, and one it made up. With ``--votes`` it also likes a target that it
was truly shown, which no check can tell from a user's own mind. Every candidate is promoted, for the gate is
another defence (``--gate`` leaves it on). Exposure: targets' share of the places on the judges' best slates.
``rise``: exposure in the last round over that of the clean arm, minus 1.

``--json``: the last line is one object [exposure by round, rise, marks, outcomes of each arm; seconds].
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from msgspec.structs import replace
from pydantic import SecretStr

from align3gr.demo.world import WorldSize
from benchmarks.loop.arms import STARTED, Arm, LoopOptions, RoundFigures
from benchmarks.loop.worlds import Ints, Levels, LoopWorld, demo
from features.interactions import Interaction, Kind
from features.log import FeedbackLog
from features.requests import sign_request
from features.settings import TrustSettings
from features.trust import marked_feedback

KEY = b"the server's and the workers' key"
CAP = 25
"""Samples of one user in a stage: room for every target, and for all that an honest user likes in a round."""
ARMS = ("clean", "open", "defended")


class PoisonedArm(Arm):
    """An arm whose request ids are signed and some of whose clients forge."""

    def __init__(
        self, name: str, home: Path, world: LoopWorld, options: LoopOptions, wanted: argparse.Namespace
    ) -> None:
        super().__init__(name, home, world, options, say)
        share, targets, self._gated = wanted.share, wanted.targets, wanted.gate
        self._votes = wanted.votes
        features = self.settings.features
        dataset = features.dataset.model_copy(
            update={"max_samples_per_user": CAP, "learn_from_unsigned": name == "open"}
        )
        if name == "open":
            changed: dict[str, Any] = {"trust": TrustSettings.none()}
        else:
            trust = TrustSettings(
                off_slate=True, max_feedback_age_s=1800.0, organic_until=STARTED + timedelta(minutes=1)
            )
            changed = {"trust": trust, "request_key": SecretStr(KEY.decode())}
        features = features.model_copy(update={**changed, "dataset": dataset})
        self.settings = self.settings.model_copy(update={"features": features})
        random = np.random.default_rng([options.seed, 31])
        learners = len(world.learners)
        self.targets = np.sort(random.permutation(len(world.items))[:targets])
        forging = 0 if name == "clean" else round(share * learners)
        self.forgers = np.sort(random.permutation(learners)[:forging])
        self._first_request: dict[int, str] = {}

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

    def exposure(self) -> float:
        """Share of the places of the judges' best slates that targets hold."""
        contexts = [
            self._context(row, list(self.world.past[row]), self.world.met[row]) for row in self.world.judges
        ]
        slates = self._rows_of(self._policy().recommend(contexts, self.world.places))
        return float(np.isin(slates, self.targets).mean())

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
            replace(one, request_id=sign_request(KEY, one.request_id, one.user_id))
            for one in events
            if one.request_id is not None
        ]
        forgers = np.intersect1d(rows, self.forgers).tolist()
        users, targets = {self.world.user_id(row) for row in forgers}, {self.items[i] for i in self.targets}
        signed += [
            replace(one, event_id=f"{one.event_id}-liked", kind=Kind.LIKE, propensity=None)
            for one in signed
            if self._votes and one.kind == Kind.SERVED and one.user_id in users and one.item_id in targets
        ]
        for place, row in enumerate(forgers):
            victim = int(rows[(np.searchsorted(rows, row) + 1 + place) % len(rows)])
            signed += self._forged(row, victim, at, number)
        return levels, signed

    def _forged(self, row: int, victim: int, at: datetime, number: int) -> Iterator[Interaction]:
        user = self.world.user_id(row)
        own = sign_request(KEY, f"{number}-{row}", user)
        others = sign_request(KEY, f"{number}-{victim}", self.world.user_id(victim))
        first = self._first_request.setdefault(row, own)
        for way, request in enumerate((None, own, first, others, f"{number}-made-up-{row}.{'0' * 32}")):
            for item in self.targets.tolist():
                yield Interaction(
                    event_id=f"{number}-forged-{way}-{item}", user_id=user, item_id=self.items[item],
                    kind=Kind.LIKE, occurred_at=at + timedelta(minutes=5, seconds=item % 50),
                    request_id=request,
                    position=None if request is None else 1 + item % self.world.places,
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
    parser.add_argument("--votes", action="store_true", help="Forgers also like targets that we show them.")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="clean must be first.")
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(line)
    if wanted.arms[0] != "clean":
        parser.error("--arms begins with clean: the others are compared with it")
    if not 0 <= wanted.share <= 1 or not 1 <= wanted.targets <= wanted.items:
        parser.error("--share must be in 0..1 and --targets in 1..--items")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    began = time.perf_counter()
    runs = [run(seed, wanted) for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds)]
    facts = {"runs": runs, "seconds": round(time.perf_counter() - began, 1)}
    for name in wanted.arms:
        by_round = np.mean([one[name]["exposure"] for one in runs], axis=0)
        rise = np.mean([one[name]["rise"] for one in runs])
        print(f"{name:<9} " + " ".join(f"{value:.4f}" for value in by_round) + f"  rise {rise:+.1%}")
    if wanted.json:
        print(json.dumps(facts))


def run(seed: int, wanted: argparse.Namespace) -> dict[str, Any]:
    """All arms under one seed."""
    world = demo(seed, WorldSize(items=wanted.items, learners=wanted.learners, evaluated=wanted.judges))
    options = LoopOptions(seed, rounds=wanted.rounds, served=wanted.learners, sft_epochs=wanted.epochs)
    place = Path(tempfile.mkdtemp(prefix="poisoning-"))
    found: dict[str, Any] = {}
    try:
        started = Arm("rfdpo", place / "base", world, options, say)
        started.begin()
        for name in wanted.arms:
            arm = PoisonedArm(name, place / name, world, options, wanted)
            arm.begin_as(started)
            exposure, rounds = [arm.exposure()], []
            for number in range(1, wanted.rounds + 1):
                rounds.append(arm.round(number))
                exposure.append(arm.exposure())
                say(f"{name} round {number}: targets hold {exposure[-1]:.4f} of the places")
            found[name] = {
                "exposure": [round(one, 5) for one in exposure],
                "outcomes": [one.outcome for one in rounds],
                "marks": arm.marks(),
            }
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for name in wanted.arms:
        found[name]["rise"] = round(found[name]["exposure"][-1] / found["clean"]["exposure"][-1] - 1, 4)
    return {"seed": seed, **found}


def say(words: str) -> None:
    """Progress, beside the result."""
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
