"""The rows of benchmarks/preference_benefit.py: what each one learns from, and how it is measured."""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from align3gr.console import say
from policies.policy import Policy, UserContext
from policies.settings import DecodingSettings
from trainer.metrics import Floats, IntArray, ListShape, Places, per_case
from trainer.preference.selfplay import STAGES, SelfPlay, play
from trainer.preference.stage import StageRun, run_stage
from trainer.settings import StageSettings, TrainerSettings

from .material import Material

LIKELIHOOD = {"beta": 1e-9, "anchor": 1.0}
"""Of a stage that learns the chosen items' likelihood alone: DPO's gradient is proportional to beta."""


@dataclass(frozen=True)
class Measured:
    """One policy on the cases."""

    per_user: Mapping[str, Floats]
    """Metric -> float64 [users]."""
    lists: IntArray
    """[users, 10] codec rows, -1 fills."""
    shape: ListShape
    learned: dict[str, Any] = field(default_factory=dict)
    """Samples, steps, seconds and the last epoch's metrics of the stage behind it."""


class Bench:
    """A data set's cases and one seed's stages, everything kept by name in ``keep``."""

    def __init__(
        self, wanted: argparse.Namespace, trainer: TrainerSettings, seed: int, base: Path, data: Material
    ) -> None:
        """``base``: the policy, in a folder of bases; what is made of it lies beside that folder."""
        self.wanted, self.trainer, self.seed, self.data = wanted, trainer, seed, data
        self.curriculum = trainer.curriculum
        key = [trainer.preference.model_dump_json(), self.curriculum.model_dump_json()]
        key += [data.name, str(wanted.train_users), str(seed), str(data.held_back)]
        self.base = base
        self.work = (
            base.parent.parent / f"seed{seed}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]}"
        )
        self.work.mkdir(parents=True, exist_ok=True)
        self.stages = [stage for stage in self.curriculum.stages if stage.selfplay]
        self.histories = data.histories

    @cached_property
    def feedback(self) -> dict[str, tuple[StageSettings, pa.Table]]:
        """Stage name -> (settings, samples) of each feedback stage that has enough samples, in order."""
        tables = self.data.feedback(self.base.parent.parent / "feedback")
        return {
            stage.name: (stage, tables[stage.feedback])
            for stage in self.curriculum.stages
            if stage.feedback in tables and tables[stage.feedback].num_rows >= stage.min_samples
        }

    def some(self, count: int | None, seed: int, skip: int = 0) -> list[str]:
        """``count`` users in the order drawn by ``seed``, behind the first ``skip``; none: all of these."""
        names = list(self.histories)
        order = np.random.default_rng(seed).permutation(len(names))[skip:]
        return [names[place] for place in order[:count]]

    def measure(self, policy: Path, name: str) -> Measured:
        """Rank the catalogue for every test user; kept by the policy and the cases."""
        wanted = self.wanted
        beside = self.base.parent.parent if policy == self.base else self.work
        cases = f"users{wanted.users or 'all'}-{wanted.skip}"
        file = beside / f"{name}-back{wanted.back}-beam{wanted.beam}-{cases}.npz"
        users = self.some(wanted.users, 0, wanted.skip)
        loaded = self._load(policy, wanted.beam)
        rows = loaded.codec.items
        if not file.is_file():
            before = [self.histories[user][: -wanted.back] for user in users]
            contexts = [
                UserContext(user, tuple(items), self.data.seen(user, wanted.back))
                for user, items in zip(users, before, strict=True)
            ]
            found = loaded.recommend(contexts, wanted.beam)
            lists = np.full((len(users), wanted.beam), -1, dtype=np.int32)
            for place, listed in enumerate(found):
                lists[place, : len(listed)] = [rows[one.item_id] for one in listed]
            with file.with_suffix(".part").open("wb") as out:
                np.savez_compressed(out, lists=lists)
            file.with_suffix(".part").rename(file)
        with np.load(file) as arrays:
            lists = arrays["lists"].astype(np.int64)
        targets = np.array([rows[self.histories[user][-wanted.back]] for user in users])
        hit = lists == targets[:, None]
        ranks = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)
        cutoffs = [k for k in (1, 10, 50, 100) if k <= wanted.beam]
        order = self._popular(loaded)
        shape = ListShape.of(lists, order, depth=10)
        facts = self.work / name / "learned.json"
        learned = json.loads(facts.read_text()) if facts.is_file() else {}
        return Measured(per_case(Places.of_ranks(ranks), cutoffs), lists[:, :10], shape, learned)

    def learn(self, name: str, start: Path, table: pa.Table, stage: StageSettings) -> Path:
        """Run a stage unless it is there; the policy it ended with."""
        out = self.work / name
        if not (out / "learned.json").is_file():
            shutil.rmtree(out, ignore_errors=True)
            began = time.process_time()
            done = run_stage(
                start,
                table,
                stage,
                self.trainer.preference,
                StageRun(out, name, seed=self.seed, device=self.wanted.device, policies=self.base.parent),
            )
            facts = {**done.as_dict(), "cpu_s": round(time.process_time() - began, 1)}
            (out / "learned.json").write_text(json.dumps(facts))
            say(f"seed {self.seed} {name}: {done.samples} samples, {done.steps} steps, {facts['cpu_s']} s")
        return out / "policy"

    def chain(self, *, once: bool) -> dict[str, Path]:
        """The curriculum's self-play stages, each from the policy of the one before."""
        policy, found = self.base, {}
        for stage in self.stages:
            name = f"once-{stage.name}" if once else stage.name
            drawn = self.played(self.base if once else policy)
            policy = self.learn(name, policy, drawn.stage(stage.data), stage)
            found[stage.name] = policy
        return found

    def flat(self, name: str) -> Path:
        """A row of one stage with as many samples, hence steps, as the whole chain."""
        drawn = self.played(self.base)
        table = _joined({stage.name: drawn.stage(stage.data) for stage in self.stages})
        stage = self.stages[0].model_copy(update={"name": name})
        if name == "sft-more":
            stage, table = self._likelihood(stage, table)
        elif name == "sdpo":
            table = self._rejecting(table, self._of_catalogue)
        elif name == "sp-mixed":
            table = self._rejecting(table, self._of_all_grades(drawn))
        return self.learn(name, self.base, table, stage)

    def rounds(self, prefix: str, start: Path, rows: Sequence[str]) -> dict[str, Path]:
        """What feedback makes of ``start``, if one of ``rows``: the likes' likelihood alone (``more``), both
        grades of rejected items in one stage of random order (``mixed``), one stage after another (by name).
        """
        stages = self.feedback
        table = _joined({name: table for name, (_, table) in stages.items()})
        first = next(iter(stages.values()))[0]
        found = {}
        for kind in ("more", "mixed"):
            name = f"{prefix}-{kind}"
            if name in rows:
                stage, samples = first.model_copy(update={"name": name}), table
                if kind == "more":
                    stage, samples = self._likelihood(stage, samples)
                found[name] = self.learn(name, start, samples, stage)
        if any(f"{prefix}-{name}" in rows for name in stages):
            policy = start
            for stage, samples in stages.values():
                name = f"{prefix}-{stage.name}"
                policy = found[name] = self.learn(name, policy, samples, stage)
        return found

    def played(self, policy: Path) -> SelfPlay:
        """Candidates of ``policy`` for the training users."""
        users = self.some(self.wanted.train_users, 1)
        return play(
            self._load(policy, self.curriculum.selfplay.width),
            {user: self.histories[user] for user in users},
            self.curriculum.selfplay,
            self.work / "selfplay",
            seed=self.seed,
            leave_out=self.data.held_back,
            clock=lambda: datetime.now(UTC),
        )

    def _likelihood(self, stage: StageSettings, table: pa.Table) -> tuple[StageSettings, pa.Table]:
        """The chosen items' likelihood alone; one rejected item a sample, for it has no say."""
        return stage.model_copy(update=LIKELIHOOD), self._rejecting(table, lambda row, _: row["rejected"][:1])

    def _rejecting(self, table: pa.Table, rejected: Any) -> pa.Table:
        """The same samples with other rejected items."""
        random = np.random.default_rng([self.seed, 7])
        wanted = [rejected(row, random) for row in table.to_pylist()]
        place = table.schema.get_field_index("rejected")
        return table.set_column(place, "rejected", pa.array(wanted, pa.list_(pa.string())))

    def _of_catalogue(self, row: Mapping[str, Any], random: np.random.Generator) -> list[str]:
        count, names = self.curriculum.selfplay.rejected, self._names
        drawn = [names[at] for at in random.integers(0, len(names), size=2 * count)]
        seen = {*self.histories[row["user_id"]][: -self.data.held_back], row["chosen"]}
        return [item for item in dict.fromkeys(drawn) if item not in seen][:count]

    def _of_all_grades(self, drawn: SelfPlay) -> Any:
        pools: dict[str, list[str]] = {}
        for stage in STAGES:
            for row in drawn.stage(stage).to_pylist():
                pools.setdefault(row["sample_id"], []).extend(row["rejected"])

        def rejected(row: Mapping[str, Any], random: np.random.Generator) -> list[str]:
            pool = pools[row["sample_id"].split("/")[0]]
            return [pool[at] for at in random.permutation(len(pool))[: self.curriculum.selfplay.rejected]]

        return rejected

    @cached_property
    def _names(self) -> list[str]:
        return list(self._load(self.base, 1).codec.item_ids)

    def _popular(self, policy: Policy) -> IntArray:
        """Codec rows by training interactions, most first."""
        rows = policy.codec.items
        met = np.concatenate(
            [[rows[item] for item in items[: -self.data.held_back]] for items in self.histories.values()]
        )
        counts = np.bincount(met.astype(np.int64), minlength=len(rows))
        return np.argsort(-counts, kind="stable")

    def _load(self, directory: Path, beam: int) -> Policy:
        return Policy.load(
            directory,
            device=self.wanted.device,
            verify=False,
            policies=self.base.parent,
            merged=True,
            settings=DecodingSettings(beam=beam, batch=64),
        )


def _joined(tables: Mapping[str, pa.Table]) -> pa.Table:
    """One table of all samples; ids stay unique."""
    named = []
    for stage, table in tables.items():
        ids = pa.array([f"{one}/{stage}" for one in table.column("sample_id").to_pylist()], pa.string())
        named.append(table.set_column(0, "sample_id", ids))
    return pa.concat_tables(named)
