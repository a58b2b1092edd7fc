"""The steps of a round, each done once: dataset, the preference stages, evaluate, gate, register, ledger.

Datasets have their content as name, stages are deterministic, a registered policy names its round and a
ledger entry its mover: so a step that was interrupted anywhere is simply done again. The candidate becomes
the reference only when the gate says so and its parent still is the reference.
"""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cached_property, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.cases import evaluation_cases
from features.catalogue import Catalogue
from features.datasets import PreferenceDataset
from features.duck import connect
from features.errors import BadInput
from features.histories import histories
from policies.directory import read_manifest, write_manifest
from policies.gate import decide
from policies.gate.record import decision_as_dict
from policies.ledger import LedgerConflict, PromotionHeld
from policies.policy import Policy
from policies.runs import RoundRun

from .cases import RankingCase, cases_of
from .errors import TrainerError
from .judging import measure, read_gate_input
from .newcomers import grow_codec, grown_codec
from .preference.guards import guard_cases
from .preference.stage import METRICS, NotEnoughSamples, StageRun, run_stage
from .round_state import RoundState, ended, write_json
from .settings import StageSettings
from .stage_guards import StageGuards
from .training_input import most_liked
from .workplace import Workplace

log = logging.getLogger(__name__)

_ELIGIBLE, _POPULAR, _CODEC = "eligible.json", "popularity.json", "codec"


class NoStageRan(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """Every stage of the round was below its minimum of samples."""


class RoundSteps:
    """One round at work. ``state`` is what is on disk."""

    def __init__(self, workplace: Workplace, state: RoundState) -> None:
        self.workplace, self.state = workplace, state
        self.directory = workplace.rounds.path(state.round_id)
        self._stages = workplace.trainer.preference.stages

    def run(self) -> RoundState:
        """Every step that is not done yet, then the end: the leading process."""
        with self.workplace.registry.round_run(self.state.round_id) as notes:
            notes.params(self._parameters())
            self._step("dataset", self._dataset)
            for stage in self._stages:
                self._step(stage.name, partial(self._stage, stage))
                self._note_stage(notes, stage)
            self._require_a_stage()
            self._step("evaluate", self._evaluate)
            self._step("gate", self._gate)
            self._step("register", self._register)
            self._step("ledger", self._ledger)
            for name, value in self.state.steps["evaluate"]["candidate"].items():
                notes.metrics({f"gate/{name}": value})
            return self._end()

    def run_together(self) -> RoundState:
        """What a process beside the leading one takes part in: the stages."""
        for name, work in [("dataset", None), *((stage.name, stage) for stage in self._stages)]:
            if name not in self.state.steps:
                if work is not None:
                    self._stage(work)
                self.workplace.ranks.wait()
                self.state = self.workplace.rounds.read(self.state.round_id)
        return self.state

    def run_again(self) -> RoundState:
        """The steps up to the decision; nothing outside of the round's directory and the datasets changes."""
        self._step("dataset", self._dataset)
        for stage in self._stages:
            self._step(stage.name, partial(self._stage, stage))
        self._require_a_stage()
        self._step("evaluate", self._evaluate)
        self._step("gate", self._gate)
        return self.state

    def candidate(self) -> Path:
        """The policy that the last stage ended with."""
        return self._policy_before(None)

    def _step(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do ``work`` unless the state says it is done."""
        if name in self.state.steps:
            return
        self._observe(name, 0, 0)
        started = self.workplace.clock()
        self.state = self.workplace.rounds.finish_step(self.state, name, work())
        seconds = (self.workplace.clock() - started).total_seconds()
        log.info("round step round=%s step=%s seconds=%.1f", self.state.round_id, name, seconds)
        if name == "dataset" or name in {stage.name for stage in self._stages}:
            self.workplace.ranks.wait()

    def _dataset(self) -> dict[str, Any]:
        """Both stages' samples at the pinned log version, and the items that may be recommended."""
        workplace = self.workplace
        snapshot = workplace.log().snapshot(self.state.log_version)
        if not (self.directory / _ELIGIBLE).exists():
            write_json(self.directory / _ELIGIBLE, self._listed())
        dataset = PreferenceDataset.build(
            snapshot,
            workplace.features,
            workplace.datasets,
            gate_share=workplace.policies.gate.share,
            stop_share=self._stop_share(),
            lineage=workplace.registry.lineage(self.state.parent),
            clock=workplace.clock,
            progress=partial(self._observe, "dataset"),
        )
        with connect(workplace.features) as con:
            found = histories(con, snapshot, workplace.features)
        popular = most_liked(found.column("item_ids").to_pylist(), found.column("levels").to_pylist())
        write_json(self.directory / _POPULAR, popular)
        parent = workplace.registry.path(self.state.parent)
        new_items = grow_codec(parent, self._catalogue(), self.directory / _CODEC)
        counts = {name: stage.by_role for name, stage in dataset.manifest.stages.items()}
        return {"dataset_id": dataset.dataset_id, "samples": counts, "new_items": new_items}

    def _stage(self, stage: StageSettings) -> dict[str, Any]:
        """One preference stage, from its start; skipped when it has too few samples."""
        assert stage.feedback is not None  # a round with self-play stages is refused before it begins
        workplace, out = self.workplace, self.directory / stage.name
        if workplace.ranks.leads:
            shutil.rmtree(out / "policy", ignore_errors=True)
        workplace.ranks.wait()
        dataset = self._built()
        try:
            result = run_stage(
                self._policy_before(stage.name),
                dataset.stage(stage.feedback, "train"),
                stage,
                workplace.trainer.preference,
                StageRun(
                    out_dir=out,
                    version=f"{self.state.round_id}-{stage.name}",
                    seed=derived_seed(self.state.seed, stage.name),
                    device=workplace.ranks.place(self.state.device),
                    policies=workplace.registry.directory,
                    codec=grown_codec(self.directory / _CODEC),
                    ranks=workplace.ranks,
                    observe=partial(self._observe, stage.name),
                ),
                stop_table=dataset.stage(stage.feedback, "stop") if self._stop_share() else None,
                popularity=self._read(_POPULAR),
                lineage={"parent": self.state.parent, "dataset_id": dataset.dataset_id},
            )
        except NotEnoughSamples as few:
            log.info("round stage skipped round=%s cause=%s", self.state.round_id, few)
            return {"skipped": str(few)}
        guard = self._guard(stage.name, result.policy) if workplace.ranks.leads else {}
        return {**result.as_dict(), **guard}

    def _guard(self, stage: str, after: Path) -> dict[str, Any]:
        """Whether the stage did harm, by the likes of the stop users: then it is not built upon.

        The gate's own users are left to the gate.
        """
        if not self.workplace.trainer.preference.guards.in_rounds:
            return {}
        found = self._guards.judge(stage, self._policy_before(stage), after, "stop users", self._guard_cases)
        if found["broken"]:
            log.warning("round stage not chained round=%s cause=%s", self.state.round_id, found["broken"])
        return {"guard": found, "chained": not found["broken"]}

    @cached_property
    def _guards(self) -> StageGuards:
        workplace = self.workplace
        return StageGuards(
            self.directory / "guards",
            workplace.registry.path(self.state.parent),
            workplace.trainer.preference.guards,
            partial(
                Policy.load,
                device=workplace.ranks.place(self.state.device),
                policies=workplace.registry.directory,
                settings=workplace.policies.decoding,
            ),
            self._observe,
            eligible=self._read(_ELIGIBLE),
            popularity=self._read(_POPULAR),
        )

    @cached_property
    def _guard_cases(self) -> list[RankingCase]:
        workplace = self.workplace
        found = evaluation_cases(
            workplace.log().snapshot(self.state.log_version),
            workplace.features,
            gate_share=workplace.policies.gate.share,
            stop_share=self._stop_share(),
            role="stop",
        )
        return guard_cases(cases_of(found.slates, found.ranking)[1], workplace.trainer.preference.guards)

    def _evaluate(self) -> dict[str, Any]:
        """Candidate, parent and anchor on the gate users, for the gate to judge."""
        return measure(
            self.workplace,
            self.state,
            candidate=self._policy_before(None),
            since=self._built().manifest.since,
            stop_share=self._stop_share(),
            eligible=self._read(_ELIGIBLE),
            out=self.directory / "gate_input.json",
        )

    def _gate(self) -> dict[str, Any]:
        """The decision, from the stored figures."""
        given = read_gate_input(self.directory / "gate_input.json")
        settings, seed = self.workplace.policies.gate, derived_seed(self.state.seed, "gate")
        decision = decide(given, settings, seed=seed)
        write_json(self.directory / "decision.json", decision_as_dict(decision, settings, seed))
        return {"outcome": decision.outcome, "why": decision.why, "users": decision.users}

    def _register(self) -> dict[str, Any]:
        """Number the candidate; after a kill the registry knows it by its round."""
        staging, steps = self._policy_before(None), self.state.steps
        if staging.exists():
            manifest = read_manifest(staging)
            stages = {name: steps[name]["last"] for name in self._ran()}
            lineage = {
                **manifest.lineage,
                "parent": self.state.parent,
                "dataset_id": steps["dataset"]["dataset_id"],
                "round_id": self.state.round_id,
                "settings": self.state.settings,
                "metrics": {**stages, **steps["evaluate"]["candidate"]},
                "gate": steps["gate"],
                "created_at": self.workplace.clock().isoformat(),
            }
            write_manifest(staging, manifest.model_copy(update={"lineage": lineage}))
        version = self.workplace.registry.register(staging, round_id=self.state.round_id)
        return {"version": version}

    def _ledger(self) -> dict[str, Any]:
        """Promote the candidate, or make it the canary: when the gate passed it and nobody objects."""
        version, gate = self.state.steps["register"]["version"], self.state.steps["gate"]
        if gate["outcome"] != "promote":
            return {"outcome": {"hold": "held", "refuse": "refused"}[gate["outcome"]], "why": gate["why"]}
        if not self.workplace.policies.promotion.automatic:
            return {
                "outcome": "registered",
                "why": "promotion is left to a person: promotion.automatic is off",
            }
        ledger, who = self.workplace.ledger, f"round {self.state.round_id}"
        moved = any(entry.who == who and entry.target == version for entry in ledger.history())
        canary, parent, why = self.workplace.policies.promotion.canary, self.state.parent, gate["why"]
        try:
            if moved:
                pass
            elif canary is not None:
                share = canary.steps[0]
                ledger.start_canary(version, share, expects=parent, who=who, why=why, automatic=True)
            else:
                ledger.promote(version, expects=parent, who=who, why=why, automatic=True)
        except (LedgerConflict, PromotionHeld) as error:
            return {"outcome": "registered", "why": str(error)}
        return {"outcome": "promoted" if canary is None else "canary", "why": why}

    def _end(self) -> RoundState:
        facts, at = self.state.steps["ledger"], self.workplace.clock()
        self.state = self.workplace.rounds.write(
            ended(self.state, "finished", at, outcome=facts["outcome"], message=facts["why"])
        )
        for stage in self._ran()[:-1]:
            shutil.rmtree(self.directory / stage / "policy", ignore_errors=True)
        log.info("round end round=%s outcome=%s why=%s", self.state.round_id, facts["outcome"], facts["why"])
        return self.state

    def _policy_before(self, stage: str | None) -> Path:
        """The policy that ``stage`` starts from; None: the one that the last stage ended with."""
        path = self.workplace.registry.path(self.state.parent)
        for name in self._ran():
            if name == stage:
                break
            path = self.directory / name / "policy"
        return path

    def _ran(self) -> list[str]:
        """Finished stages that were neither skipped nor stopped by a guard, in order."""
        facts = {s.name: self.state.steps[s.name] for s in self._stages if s.name in self.state.steps}
        return [name for name, one in facts.items() if "skipped" not in one and one.get("chained", True)]

    def _require_a_stage(self) -> None:
        if not self._ran():
            reasons = "; ".join(self._why_not(stage.name) for stage in self._stages)
            raise NoStageRan(f"no stage of round {self.state.round_id} came to anything: {reasons}")

    def _why_not(self, stage: str) -> str:
        facts = self.state.steps[stage]
        if "skipped" in facts:
            return str(facts["skipped"])
        return f"stage {stage} broke a guard: {'; '.join(facts['guard']['broken'])}"

    def _built(self) -> PreferenceDataset:
        name = self.state.steps["dataset"]["dataset_id"]
        return PreferenceDataset.open(self.workplace.datasets / name)

    def _stop_share(self) -> float:
        """Users are set aside for early stopping and guards only where one of them is on."""
        trainer = self.workplace.trainer
        used = trainer.preference.patience or trainer.preference.guards.in_rounds
        return trainer.round.stop_share if used else 0.0

    def _read(self, name: str) -> list[str]:
        items: list[str] = json.loads((self.directory / name).read_text(encoding="utf-8"))
        return items

    def _listed(self) -> list[str]:
        ids: list[str] = self._catalogue().column("item_id").to_pylist()
        return ids

    def _catalogue(self) -> pa.Table:
        """The listed items."""
        catalogue = Catalogue.open(self.workplace.home / "catalogue", create=False)
        return catalogue.items(listed_only=True, revision=self.state.catalogue_revision)

    def _parameters(self) -> dict[str, Any]:
        state, trainer = self.state, self.state.settings["trainer"]
        return {
            "seed": state.seed,
            "device": state.device,
            "parent": state.parent,
            "log_version": state.log_version,
            "preference": trainer["preference"],
            "round": trainer["round"],
        }

    def _note_stage(self, notes: RoundRun, stage: StageSettings) -> None:
        """The stage's curves, from its own file."""
        if stage.name not in self._ran():
            return
        file = self.directory / stage.name / METRICS
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            step = row.pop("step")
            notes.metrics({f"{stage.name}/{name}": value for name, value in row.items()}, step=step)

    def _observe(self, step: str, done: int, total: int) -> None:
        if self.workplace.observe is not None:
            self.workplace.observe(step, done, total)


def derived_seed(seed: int, name: str) -> int:
    """A seed for one part of a round, independent of its other parts: 31 bits."""
    return int.from_bytes(blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "big") >> 1
