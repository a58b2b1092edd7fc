"""The gate against candidates whose true worth is known: what it refuses, what it promotes, from what sample.

    python benchmarks/gate_power.py candidates --world demo|jester [--folder jester/] [--runs 200]
    python benchmarks/gate_power.py sequences [--runs 1000]
    python benchmarks/gate_power.py off-policy [--runs 200]

*candidates*: tables of scores in a known world (benchmarks/loop/trials.py) go through
``policies.gate.decide`` with the product's default settings: planted bad ones of five kinds at three
strengths each, the reference itself, a twin of equal worth, a candidate that is truly better by 5%, and
chains of 20 candidates that are each 0.5% worse than the one before and are taken unless they are refused.
*sequences*: canaries without a difference, looked at after every batch (policies/sequential.py).
*off-policy*: intervals for policies whose truth is known (benchmarks/loop/off_policy_trials.py). Each part is
a key of the file of results (``--out``, default benchmarks/results/gate_power.json), with its command,
commit, device, date and seconds.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from align3gr.demo.world import WorldSize
from benchmarks.loop.trials import Log, TrialWorld, wilson
from benchmarks.loop.worlds import demo, jester
from benchmarks.measuring import circumstances, clocks, record, since
from policies.gate import Decision, decide
from policies.sequential import ConfidenceSequence
from policies.settings import GateSettings

SETTINGS = GateSettings()
USERS = 500
"""Gate users of a run, unless a row says otherwise."""
STRENGTHS = {
    "noise": (0.1, 0.2, 0.4),
    "inverted": (0.1, 0.2, 0.4),
    "popular": (0.1, 0.15, 0.25),
    "new users": (0.2, 0.4, 0.6),
    "young items": (0.2, 0.4, 0.6),
}
"""Kind -> loss of true worth; of the last two within the fifth of users or items that they harm."""
SLICES = ("new users", "young items")
GAIN = 0.05
GAIN_USERS = (250, 500, 1000, 2000)
SLICE_USERS = 1500
CHAIN, CHAIN_LOSS = 20, 0.005


class Bench:
    """One world, its rows, and what has been counted."""

    def __init__(self, trial: TrialWorld, runs: int) -> None:
        self.trial, self.runs = trial, runs

    def kind(self, kind: str, loss: float, users: int) -> dict[str, Any]:
        """One row: candidates of a kind that lose ``loss`` (negative: gain) of their true worth."""
        strength = self.trial.strength(kind, loss)
        if strength is None:
            return {"kind": kind, "loss": loss, "out_of_reach": True}
        change = self.trial.changes()[kind]
        everybody = np.arange(len(self.trial.reference))
        outcomes, named = Counter[str](), Counter[str]()
        for run in range(self.runs):
            random = np.random.default_rng([self.trial.seed, 31, run, users])
            log = self.trial.log(users, random)
            decision = self._decide(change(log.rows, strength, random), log, run)
            outcomes[decision.outcome] += 1
            named.update({one.name for one in decision.failed if one.role == "guard"})
        worth = [
            self.trial.loss(
                kind, change(everybody, strength, np.random.default_rng([self.trial.seed, 35, one]))
            )
            for one in range(3)
        ]
        return {
            "kind": kind,
            "loss": loss,
            "loss_measured": float(np.mean(worth)),
            "users": users,
            **self._shares(outcomes),
            "failed": {name: count / self.runs for name, count in named.most_common(5)},
        }

    def equal(self, name: str) -> dict[str, Any]:
        """The reference itself, or another policy of its worth."""
        outcomes = Counter[str]()
        for run in range(self.runs):
            random = np.random.default_rng([self.trial.seed, 32, run])
            log = self.trial.log(USERS, random)
            same = self.trial.reference[log.rows]
            candidate = same if name == "itself" else self.trial.twin(log.rows, random)
            outcomes[self._decide(candidate, log, run).outcome] += 1
        return {"kind": name, "users": USERS, **self._shares(outcomes)}

    def chains(self, *, anchored: bool, runs: int) -> dict[str, Any]:
        """Chains of candidates each a bit worse than the last; what is not refused becomes the reference."""
        stopped, by_anchor, lost = [], 0, []
        harm = self.trial.changes()["inverted"]
        for run in range(runs):
            step_stopped, before = None, 0.0
            for step in range(1, CHAIN + 1):
                strength = self._chain_strength(step)
                log = self.trial.log(USERS, np.random.default_rng([self.trial.seed, 33, run, step]))

                def scores(strength: float, log: Log = log, step: int = step, run: int = run) -> np.ndarray:
                    # one direction of harm, a little further at every step
                    return harm(log.rows, strength, np.random.default_rng([self.trial.seed, 34, run, step]))

                given = self.trial.given(
                    scores(strength),
                    log,
                    reference=scores(before),
                    anchor=self.trial.reference[log.rows] if anchored and step > 1 else None,
                )
                decision = decide(given, SETTINGS, seed=run * 100 + step)
                if decision.outcome == "refuse":
                    step_stopped = step
                    by_anchor += any(one.name.endswith("_anchor") for one in decision.failed)
                    break
                before = strength
            stopped.append(step_stopped)
            taken = CHAIN if step_stopped is None else step_stopped - 1
            lost.append(1 - (1 - CHAIN_LOSS) ** taken)
        steps = [one for one in stopped if one is not None]
        return {
            "kind": f"chain, {'with' if anchored else 'without'} the anchor",
            "candidates": CHAIN,
            "each_loses": CHAIN_LOSS,
            "runs": runs,
            "users": USERS,
            "stopped": len(steps) / runs,
            "stopped_interval": wilson(len(steps), runs),
            "by_anchor": by_anchor / runs,
            "median_step": float(np.median(steps)) if steps else None,
            "last_step": max(steps) if steps else None,
            "lost": float(np.mean(lost)),
            "lost_at_most": float(np.max(lost)),
        }

    @cache  # noqa: B019 - one Bench a run
    def _chain_strength(self, step: int) -> float:
        """Of the candidate that has lost CHAIN_LOSS ``step`` times over."""
        strength = self.trial.strength("inverted", 1 - (1 - CHAIN_LOSS) ** step)
        assert strength is not None
        return strength

    def _decide(self, candidate: np.ndarray, log: Log, seed: int) -> Decision:
        return decide(self.trial.given(candidate, log), SETTINGS, seed=seed)

    def _shares(self, outcomes: Counter[str]) -> dict[str, Any]:
        shares: dict[str, Any] = {"runs": self.runs}
        for name in ("refuse", "hold", "promote"):
            shares[name] = outcomes[name] / self.runs
            shares[f"{name}_interval"] = wilson(outcomes[name], self.runs)
        return shares


def candidates(
    world: str,
    folder: Path | None,
    runs: int,
    *,
    only: Sequence[str] | None,
    note: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The table of one world; ``only`` rows of these kinds; ``note`` is told of all rows after each."""
    if world == "jester":
        assert folder is not None
        made = jester(folder, 1, learners=5200, judges=2000)
    else:
        made = demo(1, WorldSize(items=300, learners=3000, evaluated=1000))
    bench = Bench(TrialWorld(made, 1), runs)
    rows: list[dict[str, Any]] = []
    facts = {
        "world": world,
        "users_of_world": len(made.liked),
        "items": len(made.items),
        "reference_worth": bench.trial.reference_worth,
        "best_worth": bench.trial.worth(bench.trial.truth),
        "settings": SETTINGS.model_dump(mode="json"),
        "rows": rows,
    }

    def add(name: str, row: Callable[[], dict[str, Any]]) -> None:
        if only is not None and name not in only:
            return
        rows.append(row())
        note(facts)
        told = {key: value for key, value in rows[-1].items() if "interval" not in key}
        sys.stderr.write(json.dumps(told) + "\n")
        sys.stderr.flush()

    for name in ("itself", "twin"):
        add(name, partial(bench.equal, name))
    for kind in ("better", "better, retrained"):
        for users in GAIN_USERS[: 3 if kind == "better" else None]:
            add(kind, partial(bench.kind, kind, -GAIN, users))
    for kind, losses in STRENGTHS.items():
        for loss in losses:
            add(kind, partial(bench.kind, kind, loss, SLICE_USERS if kind in SLICES else USERS))
    add("chain", partial(bench.chains, anchored=True, runs=runs))
    add("chain", partial(bench.chains, anchored=False, runs=max(1, runs // 8)))
    return facts


def sequences(runs: int) -> dict[str, Any]:
    """False alarms of canaries without a difference, looked at after every batch; a plain interval beside."""
    kinds = {
        "liked shares, 30%": lambda random, n: (
            (random.random(n) < 0.3) - (random.random(n) < 0.3).astype(float)
        ),
        "means of users": lambda random, n: random.beta(2, 3, n) - random.beta(2, 3, n),
    }
    found = {}
    for name, draw in kinds.items():
        alarms = naive = 0
        for run in range(runs):
            random = np.random.default_rng([41, run])
            sequence, alarm, fooled, total, squares = ConfidenceSequence(0.05), False, False, 0.0, 0.0
            for _ in range(BATCHES):
                batch = draw(random, BATCH)
                sequence.update(batch)
                total, squares = total + batch.sum(), squares + (batch**2).sum()
                mean = total / sequence.n
                error = np.sqrt(max(squares / sequence.n - mean**2, 0.0) / sequence.n)
                fooled |= bool(abs(mean) > 1.96 * error > 0)
                alarm |= not sequence.low <= 0.0 <= sequence.high
            alarms, naive = alarms + alarm, naive + fooled
        found[name] = {
            "canaries": runs,
            "looks": BATCHES,
            "observations": BATCHES * BATCH,
            "false_alarms": alarms / runs,
            "false_alarms_interval": wilson(alarms, runs),
            "plain_interval_false_alarms": naive / runs,
        }
        sys.stderr.write(json.dumps({name: found[name]}) + "\n")
    return found


BATCHES, BATCH = 25, 80


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("candidates", "sequences", "off-policy"))
    parser.add_argument("--world", choices=("demo", "jester"), default="demo")
    parser.add_argument("--folder", type=Path, default=None, help="Of jester: ratings.npz, jokes.jsonl.gz.")
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--only", action="append", default=None, help="Rows of this kind; may be repeated.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gate_power.json")
    wanted = parser.parse_args()
    if wanted.world == "jester" and wanted.folder is None:
        parser.error("--world jester needs --folder with ratings.npz and jokes.jsonl.gz")
    started, where = clocks(), circumstances()

    def note(key: str, facts: dict[str, Any]) -> None:
        record(wanted.out, key, {**where, **since(started), **facts})

    if wanted.part == "candidates":
        key = f"candidates_{wanted.world}"
        runs = wanted.runs or 200
        told = partial(note, key)
        told(candidates(wanted.world, wanted.folder, runs, only=wanted.only, note=told))
    elif wanted.part == "sequences":
        note("sequences", sequences(wanted.runs or 1000))
    else:
        from benchmarks.loop.off_policy_trials import coverage

        note("off_policy", coverage(wanted.runs or 200))


if __name__ == "__main__":
    main()
