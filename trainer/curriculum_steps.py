"""The steps of a curriculum, each done once: start, dataset, the stages with their guards, register.

A self-play stage draws its candidates from the policy as it is then, which is also its reference. A
feedback stage reads the same datasets as a round. Either is skipped, with the reason, where there is too
little to learn from.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from features.cases import evaluation_cases
from features.datasets import EmptyLog, PreferenceDataset, TooFewLikes
from features.split import roles_table
from policies.directory import read_manifest, write_manifest
from policies.policy import Policy

from .cases import RankingCase, cases_of, leave_one_out
from .preference.guards import guard_cases
from .preference.selfplay import NothingToPlay, SelfPlay, play
from .preference.stage import NotEnoughSamples, StageRun, run_stage
from .round_state import RoundState, ended
from .round_steps import RoundSteps, derived_seed
from .settings import StageSettings
from .sft.bootstrap import bootstrap
from .sft.training import Step
from .stage_guards import StageGuards
from .training_input import read_training_input, training_histories
from .workplace import Workplace

log = logging.getLogger(__name__)

GUARDED_ITEM = 2
"""Places from the end of the item that guards look for: the one in front of the last (validation)."""


@dataclass(frozen=True)
class _StageData:
    """What a stage learns from."""

    table: pa.Table
    stop: pa.Table | None
    facts: dict[str, Any]


class _NoData(Exception):  # noqa: N818 - reads as what it is at the raise site
    """A stage has nothing to learn from; the message says why."""


class CurriculumSteps(RoundSteps):
    """One chain at work. ``state`` is what is on disk."""

    def __init__(self, workplace: Workplace, state: RoundState, who: str) -> None:
        super().__init__(workplace, state)
        self.who = who
        self.settings = workplace.trainer.curriculum
        self._stages = self.settings.stages

    def run(self) -> RoundState:
        """Every step that is not done yet, then the end."""
        self._step("start", self._start)
        started = self.state.steps["start"]["version"]
        self.state = self.workplace.rounds.write(replace(self.state, parent=started))
        if any(stage.feedback for stage in self._stages):
            self._step("dataset", self._dataset)
        for stage in self._stages:
            self._step(stage.name, partial(self._stage, stage))
        self._step("register", self._register)
        return self._end()

    def _start(self) -> dict[str, Any]:
        """The policy that the chain starts from: the one named, or SFT's."""
        workplace = self.workplace
        if self.state.parent:
            return {"version": self.state.parent, "made": "given"} | self._forewarned(self.state.parent)

        def progress(step: Step) -> None:
            self._observe("sft", step.step, step.steps)

        done = bootstrap(
            workplace.home,
            read_training_input(workplace.home, workplace.features),
            workplace.trainer.sft,
            workplace.registry,
            workplace.ledger,
            who=self.who,
            clock=workplace.clock,
            device=self.state.device,
            leave_out=self.settings.leave_out + self.settings.fresh,
            progress=progress,
        )
        assert done is not None  # alone, this process leads
        return {"version": done.version, "made": "sft", "sft": done.report.as_dict()}

    def _forewarned(self, version: str) -> dict[str, Any]:
        """Said where the policy knows the items that guards look for, or self-play's targets."""
        left_out = read_manifest(self.workplace.registry.path(version)).lineage.get("leave_out")
        known = []
        if left_out is not None and left_out < GUARDED_ITEM:
            known.append("the items that the guards look for (their figures flatter it)")
        played = any(stage.selfplay for stage in self._stages)
        if left_out is not None and played and left_out <= self.settings.leave_out:
            known.append("self-play's targets by heart (to learn them again did harm where it was measured)")
        if not known:
            return {}
        why = (
            f"{version} was trained with --leave-out {left_out}, so it knows {' and '.join(known)}: better "
            f"start from one trained with --leave-out {self.settings.leave_out + max(self.settings.fresh, 1)}"
        )
        log.warning("curriculum id=%s cause=%s", self.state.round_id, why)
        return {"warning": why}

    def _dataset(self) -> dict[str, Any]:
        """Feedback's samples at the pinned log version; none where there is no feedback to speak of."""
        workplace = self.workplace
        try:
            dataset = PreferenceDataset.build(
                workplace.log().snapshot(self.state.log_version),
                workplace.features,
                workplace.home / "datasets",
                gate_share=workplace.policies.gate.share,
                stop_share=self._stop_share(),
                clock=workplace.clock,
                progress=partial(self._observe, "dataset"),
            )
        except (EmptyLog, TooFewLikes) as few:
            log.info("curriculum feedback skipped id=%s cause=%s", self.state.round_id, few)
            return {"skipped": str(few)}
        counts = {name: stage.by_role for name, stage in dataset.manifest.stages.items()}
        return {"dataset_id": dataset.dataset_id, "samples": counts}

    def _stage(self, stage: StageSettings) -> dict[str, Any]:
        """One stage from its start, then its guard."""
        workplace, out = self.workplace, self.directory / stage.name
        shutil.rmtree(out / "policy", ignore_errors=True)
        preference = workplace.trainer.preference
        patience = preference.patience if stage.patience is None else stage.patience
        before = self._policy_before(stage.name)
        try:
            data = self._data(stage)
            result = run_stage(
                before,
                data.table,
                stage,
                preference.model_copy(update={"patience": patience}),
                StageRun(
                    out_dir=out,
                    version=f"{self.state.round_id}-{stage.name}",
                    seed=derived_seed(self.state.seed, stage.name),
                    device=self.state.device,
                    policies=workplace.registry.directory,
                    observe=partial(self._observe, stage.name),
                ),
                stop_table=data.stop if patience else None,
                lineage={"parent": self.state.parent, "leave_out": self.settings.leave_out},
            )
        except (NotEnoughSamples, NothingToPlay, _NoData) as few:
            log.info("curriculum stage skipped id=%s stage=%s cause=%s", self.state.round_id, stage.name, few)
            return {"skipped": str(few)}
        guard = self._guards.judge(stage.name, before, result.policy, *self._cases(stage))
        if guard["broken"]:
            log.warning("curriculum stage not chained stage=%s cause=%s", stage.name, guard["broken"])
        return {**result.as_dict(), **data.facts, "guard": guard, "chained": not guard["broken"]}

    def _data(self, stage: StageSettings) -> _StageData:
        """The stage's samples. Raises _NoData, NothingToPlay."""
        if stage.selfplay is None:
            assert stage.feedback is not None
            facts = self.state.steps["dataset"]
            if "skipped" in facts:
                raise _NoData(facts["skipped"])
            dataset = self._built()
            stop = dataset.stage(stage.feedback, "stop") if self._stop_share() else None
            return _StageData(
                dataset.stage(stage.feedback, "train"), stop, {"dataset_id": dataset.dataset_id}
            )
        played = self._play(stage.name)
        whole = played.stage(stage.selfplay)
        return _StageData(
            _of_role(whole, "train", *self._shares()),
            _of_role(whole, "stop", *self._shares()) if self._stop_share() else None,
            {"selfplay": {"id": played.selfplay_id, **played.manifest["stages"][stage.selfplay]}},
        )

    def _play(self, stage: str) -> SelfPlay:
        """Candidates of the policy as it is before ``stage``, or as it was at the chain's start.

        Gate users play no part, as in rounds. What an earlier stage drew from the same policy is there.
        """
        once = self.settings.draw == "once"
        start = self.workplace.registry.path(self.state.parent)
        users = [user for user in self._histories if user not in self._gate_users]
        return play(
            self._load(start if once else self._policy_before(stage)),
            {user: self._histories[user] for user in users},
            self.settings.selfplay,
            self.directory / "selfplay",
            seed=derived_seed(self.state.seed, "selfplay"),
            leave_out=self.settings.leave_out,
            clock=self.workplace.clock,
            progress=partial(self._observe, f"{stage}: play"),
        )

    @cached_property
    def _guards(self) -> StageGuards:
        return StageGuards(
            self.directory / "guards",
            self.workplace.registry.path(self.state.parent),
            self.workplace.trainer.preference.guards,
            self._load,
            self._observe,
        )

    def _cases(self, stage: StageSettings) -> tuple[str, list[RankingCase]]:
        """Gate users' likes for a feedback stage where there are enough, else the items left out."""
        bounds = self.workplace.trainer.preference.guards
        if stage.feedback and (cases := guard_cases(self._gate_cases, bounds)):
            return "gate users", cases
        if self.settings.leave_out < GUARDED_ITEM:
            return "left out", []
        left_out = [case for case, _ in leave_one_out(self._histories, back=GUARDED_ITEM) if case.history]
        return "left out", guard_cases(left_out, bounds)

    @cached_property
    def _gate_cases(self) -> list[RankingCase]:
        snapshot = self.workplace.log().snapshot(self.state.log_version)
        gate, stop = self._shares()
        found = evaluation_cases(snapshot, self.workplace.features, gate_share=gate, stop_share=stop)
        return cases_of(found.slates, found.ranking)[1]

    @cached_property
    def _histories(self) -> dict[str, list[str]]:
        snapshot = self.workplace.log().snapshot(self.state.log_version)
        return training_histories(snapshot, self.workplace.features)

    @cached_property
    def _gate_users(self) -> frozenset[str]:
        roles = roles_table(self._histories, *self._shares())
        return frozenset(roles.filter(pc.field("role") == "gate").column("user_id").to_pylist())

    def _load(self, directory: Path) -> Policy:
        return Policy.load(
            directory,
            device=self.state.device,
            policies=self.workplace.registry.directory,
            merged=True,
            settings=self.workplace.policies.decoding,
        )

    def _shares(self) -> tuple[float, float]:
        return self.workplace.policies.gate.share, self._stop_share()

    def _stop_share(self) -> float:
        """Users are set aside for early stopping only where a stage has it."""
        trainer = self.workplace.trainer
        shared = trainer.preference.patience
        used = any(shared if stage.patience is None else stage.patience for stage in self._stages)
        return trainer.round.stop_share if used else 0.0

    def _register(self) -> dict[str, Any]:
        """Number the chain's policy; without a chained stage it is the one it started from."""
        if not self._ran():
            return {"version": self.state.parent, "new": False}
        staging, steps = self._policy_before(None), self.state.steps
        if staging.exists():
            manifest = read_manifest(staging)
            lineage = {
                **manifest.lineage,
                "parent": self.state.parent,
                "dataset_id": steps.get("dataset", {}).get("dataset_id"),
                "curriculum": {"id": self.state.round_id, "stages": self._ran(), "seed": self.state.seed},
                "settings": self.state.settings,
                "metrics": {name: steps[name]["last"] for name in self._ran()},
                "guards": {name: steps[name]["guard"] for name in self._ran()},
                "created_at": self.workplace.clock().isoformat(),
            }
            write_manifest(staging, manifest.model_copy(update={"lineage": lineage}))
        return {
            "version": self.workplace.registry.register(staging, round_id=self.state.round_id),
            "new": True,
        }

    def _end(self) -> RoundState:
        facts = self.state.steps["register"]
        ran, left = self._ran(), [stage.name for stage in self._stages if stage.name not in self._ran()]
        outcome = "registered" if facts["new"] else "unchanged"
        message = f"chained {', '.join(ran) or 'no stage'}"
        message += f"; left out {', '.join(left)}" if left else ""
        self.state = self.workplace.rounds.write(
            ended(self.state, "finished", self.workplace.clock(), outcome=outcome, message=message)
        )
        for stage in self._stages:
            shutil.rmtree(self.directory / stage.name / "policy", ignore_errors=True)
        log.info("curriculum end id=%s version=%s %s", self.state.round_id, facts["version"], message)
        return self.state


def _of_role(table: pa.Table, role: str, gate_share: float, stop_share: float) -> pa.Table:
    """The samples of the users of one role."""
    roles = roles_table(table.column("user_id").to_pylist(), gate_share, stop_share)
    wanted = roles.filter(pc.field("role") == role).column("user_id")
    return table.filter(pc.is_in(table.column("user_id"), value_set=wanted.combine_chunks()))
