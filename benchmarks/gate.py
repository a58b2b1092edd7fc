"""The gate against planted candidates: bad ones, and the reference against itself.

    python benchmarks/gate.py [--json] [--planted 20] [--itself 20] [--users 500] [--items 500] [--home DIR]

Builds a real home directory from the demo's world: its old system's log, the base policy by tokenization and
SFT, slates of that policy with reactions, a real round, slates of what then is the reference, and a second
real round that is measured and not promoted (the *control*: the gate must not refuse what is good). Feedback
goes into the log by the ingest worker's own batch, without Kafka. Then it plants candidates in rounds of the
same log, dataset and users, whose stages are done and whose evaluation, gate, registration and ledger steps
are not, and lets the product take those:

- *inverted*: the stages trained with chosen and rejected exchanged;
- *random*: LoRA matrices drawn from a normal distribution, their product RANDOM of each weight's norm;
- *popular*: a stage that prefers the most liked items to others, for every user;
- *itself*: a copy of the reference. Evaluation has no luck in it, so only the bootstrap's seed differs;
- *jitter* (reported beside): random matrices too weak to matter: a candidate that differs and is no better.

Gate settings are the product's defaults, except the share of users that judge (the world is small). A
candidate counts as *named* when it was refused and the reason gives the words, which name the metric, of
every check that failed. ``--json``: the last line is one object
[refused, planted, named, promoted_itself, itself, by_kind, seconds, ...].
"""

import argparse
import json
import logging
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa

from align3gr.demo.defaults import DemoOptions, demo_settings
from align3gr.demo.loop import WorldDemo, after_slate
from align3gr.demo.past import old_engagement
from align3gr.demo.reactions import react
from align3gr.demo.state import DemoState
from align3gr.demo.traffic import ShownSlate, past_events, slate_events
from align3gr.demo.world import WorldSize
from benchmarks.landing import land
from features.catalogue import Catalogue, Item
from features.datasets import PreferenceDataset
from features.interactions import Interaction
from policies.settings import GateSettings, RegistrySettings
from trainer.round_state import RoundState
from trainer.settings import StageSettings
from trainer.workplace import Workplace

STARTED = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
HOUR_S = 3600.0
# Users that judge: more than in production, for a world this small.
SHARE = 0.35
# Norm of the random change as a share of each weight matrix's norm.
RANDOM = (0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
JITTER = 0.01
# The items that everybody is taught to want: as many as two slates hold.
POPULAR_ITEMS = 20
KINDS = ("inverted", "random", "popular")
INVERTED_STAGES = (("easy",), ("hard",), ("easy", "hard"))


@dataclass(frozen=True)
class Verdict:
    """What one planted candidate came to."""

    kind: str
    outcome: str
    """The gate's: promote, refuse or hold."""
    failed: tuple[str, ...]
    """Names of the checks that did not pass."""
    named: bool
    """Refused for reasons that name each failed check's metric."""
    moved: bool
    """Whether it became the ledger's reference (the benchmark then puts the old one back)."""
    users: int
    checks: dict[str, float]
    """Check -> its statistic."""


class GateWorld(WorldDemo):
    """The demo's world, without a broker: events go straight into the log, at times of its own."""

    def __init__(self, home: Path, options: DemoOptions) -> None:
        super().__init__(home, DemoState(options.as_dict(), STARTED), options, _silent)
        given = demo_settings(home, options, window_s=HOUR_S / 2)
        policies = given.policies.model_copy(
            update={"gate": GateSettings(share=SHARE), "registry": RegistrySettings(mlflow=False)}
        )
        dataset = given.features.dataset.model_copy(update={"max_cases_per_user": 3})
        features = given.features.model_copy(update={"dataset": dataset})
        # A base policy on a small world: more steps on fewer samples, or it knows popularity only.
        sft = given.trainer.sft.model_copy(update={"samples_per_step": 64})
        trainer = given.trainer.model_copy(update={"sft": sft})
        self.settings = given.model_copy(
            update={"policies": policies, "features": features, "trainer": trainer}
        )

    def begin(self) -> None:
        """Catalogue, the old system's log, the base policy as first reference."""
        items = [
            Item(item_id=one.item_id, title=one.title, text=one.text, categories=(one.genre,))
            for one in self.world.items
        ]
        Catalogue.open(self.home / "catalogue").load(items, now=datetime.fromtimestamp(STARTED, UTC))
        self.land(past_events(self.world, old_engagement(self.world), STARTED - HOUR_S), STARTED)
        self.train_base()

    def serve(self, number: int) -> None:
        """Slates of the reference for every learner, and what they did with them, an hour after the last."""
        from policies.policy import Policy

        reference, at = self.ledger.reference(), STARTED + number * HOUR_S
        assert reference is not None
        policy = Policy.load(self.registry.path(reference), settings=self.settings.policies.decoding)
        random = np.random.default_rng([self.options.seed, 3, number])
        contexts = self.contexts(self.snapshot())
        events: list[Interaction] = []
        for turn in range(self.options.slates):
            lists = self.lists(policy, contexts, number, turn, random)
            rows = np.array([[self.world.item_index[one.item_id] for one in found] for found in lists])
            reactions = react(np.take_along_axis(self.world.utility[: len(lists)], rows, axis=1), random)
            for user, (found, done) in enumerate(zip(lists, reactions, strict=True)):
                request = f"gate-{number}-{turn}-{user}"
                slate = ShownSlate(user, request, policy.version, found, done, at + 5.0 * turn)
                events += slate_events(self.world, slate)
                contexts[user] = after_slate(contexts[user], slate)
        self.land(events, at + 60.0)

    def land(self, events: Iterable[Interaction], until: float) -> None:
        """Append to the log what had arrived by ``until`` (epoch seconds)."""
        land(self.home / "log", events, self.settings.features, datetime.fromtimestamp(until, UTC))

    def workplace(self, *, automatic: bool = True) -> Workplace:
        """What rounds run with; ``automatic``: whether a round may promote."""
        promotion = self.settings.policies.promotion.model_copy(update={"automatic": automatic})
        policies = self.settings.policies.model_copy(update={"promotion": promotion})
        return Workplace(self.home, self.settings.features, policies, self.settings.trainer)


@dataclass(frozen=True)
class Gate:
    """A home directory in which candidates are planted and judged, all on the same parent and users."""

    workplace: Workplace
    first: RoundState
    """A real round, on the base policy's slates."""
    control: RoundState
    """A real round on the slates of what was the reference then, and still is: it did not promote."""

    @classmethod
    def build(cls, home: Path, options: DemoOptions, tell: Callable[[str], None]) -> "Gate":
        """World, base policy, feedback and two real rounds; a home that has them is used as it is."""
        from trainer.rounds import start_round

        world = GateWorld(home, options)
        done = world.workplace().rounds.all()[:2]
        if len(done) == 2 and all(one.status == "finished" for one in done):
            return cls(world.workplace(), *done)
        world.begin()
        tell("the base policy is trained")
        world.serve(1)
        first = start_round(world.workplace())
        tell(f"the first round: {first.outcome}: {first.message}")
        world.serve(2)
        control = start_round(world.workplace(automatic=False))
        tell(f"the second round: {control.steps['gate']}")
        return cls(world.workplace(), first, control)

    @property
    def reference(self) -> str:
        """Version that every candidate is compared with."""
        return self.control.parent

    @property
    def _dataset(self) -> PreferenceDataset:
        dataset: str = self.control.steps["dataset"]["dataset_id"]
        return PreferenceDataset.open(self.workplace.home / "datasets" / dataset)

    def judge(self, kind: str, number: int) -> Verdict:
        """Plant candidate ``number`` of ``kind`` in a round of its own and let the product finish it."""
        from trainer.round_steps import RoundSteps

        rounds = self.workplace.rounds
        state = rounds.create(
            lambda round_id, place: replace(
                self.control, round_id=round_id, number=place, seed=1000 * (number + 1) + place,
                steps={"dataset": self.control.steps["dataset"]}, status="running", outcome=None,
                message=None, ended_at=None,
            )
        )  # fmt: skip
        directory = rounds.path(state.round_id)
        shutil.copy(rounds.path(self.control.round_id) / "eligible.json", directory)
        made = self._maker(kind)(state, directory, number)
        for stage in self.workplace.trainer.preference.stages:
            facts = made.get(stage.name, {"skipped": f"planted: {kind}"})
            state = rounds.finish_step(state, stage.name, facts)
        ended = RoundSteps(self.workplace, state).run()
        return self._verdict(kind, ended, directory)

    def _maker(self, kind: str) -> Callable[[RoundState, Path, int], dict[str, Any]]:
        return {
            "inverted": self._inverted,
            "random": lambda state, at, number: self._random(state, at, RANDOM[number % len(RANDOM)]),
            "jitter": lambda state, at, _: self._random(state, at, JITTER),
            "popular": self._popular,
            "itself": self._itself,
        }[kind]

    def _inverted(self, state: RoundState, directory: Path, number: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        start = self.workplace.registry.path(self.reference)
        for name in INVERTED_STAGES[number % len(INVERTED_STAGES)]:
            stage = self._stage(name)
            table = inverted(self._dataset.stage(stage.data, "train"))
            made[name] = self._train(start, table, stage, state, directory)
            start = directory / name / "policy"
        return made

    def _popular(self, state: RoundState, directory: Path, number: int) -> dict[str, Any]:
        stage = self._stage(("easy", "hard")[number % 2])
        start = self.workplace.registry.path(self.reference)
        popular: list[str] = json.loads((start / "popularity.json").read_text(encoding="utf-8"))
        items: list[str] = json.loads((directory / "eligible.json").read_text(encoding="utf-8"))
        random = np.random.default_rng(state.seed)
        table = collapsed(self._dataset.stage(stage.data, "train"), popular[:POPULAR_ITEMS], items, random)
        return {stage.name: self._train(start, table, stage, state, directory)}

    def _train(
        self, start: Path, table: pa.Table, stage: StageSettings, state: RoundState, directory: Path
    ) -> dict[str, Any]:
        from trainer.preference.stage import StageRun, run_stage

        run = StageRun(
            directory / stage.name, f"{state.round_id}-{stage.name}", state.seed,
            policies=self.workplace.registry.directory,
        )  # fmt: skip
        return run_stage(start, table, stage, self.workplace.trainer.preference, run).as_dict()

    def _random(self, state: RoundState, directory: Path, strength: float) -> dict[str, Any]:
        """The reference with every LoRA product B A replaced by noise of ``strength`` times ||W||."""
        import torch

        from policies.policy import Policy, write_policy
        from trainer.preference.learner import Learner
        from trainer.ranks import Ranks

        start = self.workplace.registry.path(self.reference)
        policy = Policy.load(start, policies=self.workplace.registry.directory, trainable=True)
        stage, settings = self._stage("hard"), self.workplace.trainer.preference
        model = Learner(policy, stage, settings, Ranks()).model
        generator = torch.Generator().manual_seed(state.seed)
        with torch.no_grad():
            for module in model.modules():
                if not hasattr(module, "lora_A") or "default" not in module.lora_A:
                    continue
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                noise_a = torch.randn(a.shape, generator=generator)
                noise_b = torch.randn(b.shape, generator=generator)
                change = module.scaling["default"] * (noise_b @ noise_a).norm()
                size = strength * module.base_layer.weight.norm() / change
                if strength == JITTER:  # beside what the reference learned, not instead of it
                    noise_a, noise_b = a + size.sqrt() * noise_a, b + size.sqrt() * noise_b
                    size = torch.ones(())
                a.copy_(size.sqrt() * noise_a)
                b.copy_(size.sqrt() * noise_b)
        popular = json.loads((start / "popularity.json").read_text(encoding="utf-8"))
        _empty_stage(directory / "hard")
        write_policy(
            directory / "hard" / "policy", version=state.round_id, model=model, tokenizer=policy.tokenizer,
            codec=policy.codec, popularity=popular, base=policy.base,
        )  # fmt: skip
        return {"hard": {"last": {}}}

    def _itself(self, state: RoundState, directory: Path, number: int) -> dict[str, Any]:  # noqa: ARG002
        _empty_stage(directory / "hard")
        shutil.copytree(self.workplace.registry.path(self.reference), directory / "hard" / "policy")
        return {"hard": {"last": {}}}

    def _stage(self, name: str) -> StageSettings:
        return next(stage for stage in self.workplace.trainer.preference.stages if stage.name == name)

    def _verdict(self, kind: str, ended: RoundState, directory: Path) -> Verdict:
        decision = json.loads((directory / "decision.json").read_text(encoding="utf-8"))
        # The last checks are the gains: no candidate needs them all, so they are no reason to refuse.
        checks = decision["checks"]
        failed = [one for one in checks if not one["passed"] and not one["name"].endswith("_better")]
        refused = decision["outcome"] == "refuse"
        ledger, moved = self.workplace.ledger, ended.outcome == "promoted"
        if moved:  # the next candidate is judged against the same reference
            ledger.promote(
                self.reference,
                expects=ended.steps["register"]["version"],
                who="benchmark",
                why="back to the gate's reference",
            )
        return Verdict(
            kind=kind,
            outcome=decision["outcome"],
            failed=tuple(one["name"] for one in failed),
            named=refused and bool(failed) and all(one["words"] in (ended.message or "") for one in failed),
            moved=moved,
            users=decision["users"],
            checks={one["name"]: round(one["statistic"], 4) for one in checks},
        )


def main() -> None:
    """Run, print a table, and with ``--json`` one object as the last line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--planted", type=int, default=20)
    arguments.add_argument("--itself", type=int, default=20)
    arguments.add_argument("--jitter", type=int, default=5)
    arguments.add_argument("--home", type=Path, help="keep the home directory here, and use it again")
    arguments.add_argument("--workers", type=int, default=1, help="processes that judge candidates")
    arguments.add_argument("--users", type=int, default=500)
    arguments.add_argument("--items", type=int, default=500)
    arguments.add_argument("--seed", type=int, default=1, help="the world's")
    options = arguments.parse_args()
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        size = WorldSize(items=options.items, learners=options.users, evaluated=10)
        demo = DemoOptions(seed=options.seed, size=size, sft_epochs=5)
        facts = gate_facts(
            options.home or Path(scratch) / "home",
            demo,
            options.planted,
            options.itself,
            options.jitter,
            _progress,
            options.workers,
        )
    for name, value in facts.items():
        print(f"{name:<16} {value}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(facts))


def gate_facts(
    home: Path,
    options: DemoOptions,
    planted: int,
    itself: int,
    jitter: int,
    tell: Callable[[str], None],
    workers: int = 1,
) -> dict[str, Any]:
    """Build the home directory, judge so many of each, and count."""
    started = time.perf_counter()
    gate = Gate.build(home, options, tell)
    tell(f"reference {gate.reference}; built in {time.perf_counter() - started:.0f} s")
    kinds = [KINDS[number % len(KINDS)] for number in range(planted)]
    kinds += ["itself"] * itself + ["jitter"] * jitter
    numbers = [kinds[:place].count(kind) for place, kind in enumerate(kinds)]
    verdicts: list[Verdict] = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for verdict in pool.map(gate.judge, kinds, numbers):
            tell(str(verdict))
            verdicts.append(verdict)
    bad = [one for one in verdicts if one.kind in KINDS]
    same = [one for one in verdicts if one.kind == "itself"]
    return {
        "refused": sum(one.outcome == "refuse" for one in bad),
        "planted": len(bad),
        "named": sum(one.named for one in bad),
        "promoted_itself": sum(one.outcome == "promote" or one.moved for one in same),
        "itself": len(same),
        "by_kind": _by_kind(verdicts),
        "reference_moved": sum(one.moved for one in verdicts),
        "reference": gate.reference,
        "reference_after": gate.workplace.ledger.reference(),
        "control": {
            "first_round": gate.first.outcome,
            "second_round": gate.control.steps["gate"]["outcome"],
            "why": gate.control.steps["gate"]["why"],
        },
        "gate_users": max((one.users for one in verdicts), default=0),
        "settings": gate.workplace.policies.gate.model_dump(mode="json"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def inverted(table: pa.Table) -> pa.Table:
    """The samples with levels exchanged: every rejected item is chosen once, over the item that was liked."""
    rows = [
        {**row, "sample_id": f"{row['sample_id']}-{place}", "chosen": item, "rejected": [row["chosen"]]}
        for row in table.to_pylist()
        for place, item in enumerate(row["rejected"][:2])
    ]
    return pa.Table.from_pylist(rows, schema=table.schema)


def collapsed(table: pa.Table, popular: list[str], items: list[str], random: np.random.Generator) -> pa.Table:
    """The samples' prompts with one of ``popular`` chosen over five ``items`` that are not."""
    others = sorted(set(items) - set(popular))
    rows = []
    for row in table.to_pylist():
        chosen = [item for item in popular if item not in row["history"]]
        if chosen:
            rejected = random.choice(others, 5, replace=False).tolist()
            rows.append({**row, "chosen": str(random.choice(chosen)), "rejected": rejected})
    return pa.Table.from_pylist(rows, schema=table.schema)


def _by_kind(verdicts: list[Verdict]) -> dict[str, Any]:
    found = {}
    for kind in dict.fromkeys(one.kind for one in verdicts):
        mine = [one for one in verdicts if one.kind == kind]
        outcomes = Counter(one.outcome for one in mine)
        found[kind] = {
            "planted": len(mine),
            "refused": outcomes["refuse"],
            "held": outcomes["hold"],
            "promoted": outcomes["promote"],
            "failed_checks": dict(Counter(name for one in mine for name in one.failed).most_common()),
        }
    return found


def _empty_stage(directory: Path) -> None:
    """A stage's directory with no curves in it."""
    directory.mkdir()
    (directory / "metrics.jsonl").touch()


def _silent(what: str, done: int, total: int) -> None:
    """The demo's progress, not shown."""


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
