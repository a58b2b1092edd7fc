"""Does preference training help? Its stages against an SFT continued for as many steps, user by user.

    python benchmarks/preference_benefit.py beauty/ [--policy DIR ...] [--settings FILE] [--users 4000]
        [--skip 1500] [--train-users 4000] [--seeds 3] [--back 1] [--held-back 2] [--rows ...] [--keep DIR]
        [--record FILE] [--json]

FOLDER holds ``sequences.jsonl.gz`` (and ``items.jsonl.gz``), or ratings of MovieLens or Amazon. DIR is a full
policy that saw nothing of the last three items of each user (``align3gr sft --leave-out 3``), one for all
seeds or one for each; without it one is trained by the settings. The last item is to be found; nothing learns
from it or from the one before it. With ``--held-back 1`` nothing learns from the last item alone, and DIR is
a policy of the paper's split (``--leave-out 2``), as benchmarks/offline.py keeps them.
Preference training learns from what SFT has not seen (benchmarks/baselines/material.py). Rows of one start
learn from the same samples in as many optimizer steps, with the same LoRA, optimizer and learning rate; what
differs is what is rejected, and in which order:

    sft          the policy as it is
    sft-more     the targets' log-likelihood alone, in as many steps: what the steps are worth by themselves
    sdpo         Softmax-DPO without grading: rejected items drawn from the catalogue (paper: Softmax-DPO)
    sp-mixed     self-play without grading: rejected items of all grades together (paper: SP-DPO)
    sp-easy, sp-medium, sp-hard   the chain after each stage; the last is progressive SP-DPO
    sp-shuffled  the chain's very samples, candidates drawn once, in one stage in random order
    sp-once      the chain on those samples, easy -> medium -> hard
    rounds-more, -mixed, -easy, -hard   feedback on the SFT policy, as rounds learn it: the likes' likelihood
                 alone, both grades of rejected items in random order, easy -> hard
    rf-more, -mixed, -easy, -hard       the same on the policy behind sp-hard: the paper's last two rows

Feedback needs levels: a data set of bare sequences has none, and the benchmark says so beside these rows.
The full catalogue is ranked, seen items left out. Differences are paired: 95% bootstrap intervals over users
(and seeds). ``--back 2`` looks for the validation item, for choosing settings. ``--json``: the last line is
one object [rows: name, figures, against sft and sft-more: metric -> [share, low, high]].
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from align3gr.console import say
from benchmarks.baselines.material import NO_LEVELS, TOO_FEW, Material, material
from benchmarks.baselines.policies import base_policy
from benchmarks.baselines.preference import Bench, Measured
from benchmarks.measuring import origin
from trainer.metrics import Bootstrap, IntArray
from trainer.preference.selfplay import STAGES
from trainer.settings import TrainerSettings

METRICS = ("recall@1", "ndcg@10", "recall@10", "recall@50", "recall@100")
ROUNDS = ("rounds-more", "rounds-mixed", "rounds-easy", "rounds-hard")
RF = ("rf-more", "rf-mixed", "rf-easy", "rf-hard")
PAPER = {
    "sdpo": ("Softmax-DPO", 0.1295, 0.0972),
    "sp-mixed": ("SP-DPO", 0.1356, 0.1033),
    "sp-hard": ("progressive SP-DPO", 0.1396, 0.1042),
    "rf-mixed": ("RF-DPO", 0.1414, 0.1049),
    "rf-hard": ("progressive RF-DPO", 0.1442, 0.1113),
}
"""The paper's ablation on Instruments, Recall@10 and NDCG@10: a 7B model, test targets as chosen."""
ROWS = ("sft", "sft-more", "sdpo", "sp-mixed", *STAGES, "sp-shuffled", "sp-once", *ROUNDS, *RF)
CONTROLS = {
    "sp-once": ("sft", "sft-more", "sp-shuffled"),
    **dict.fromkeys(ROUNDS, ("sft", "rounds-more")),
    "rounds-hard": ("sft", "rounds-more", "rounds-mixed"),
    **dict.fromkeys(RF, ("sft", "sp-hard", "rf-more")),
    "rf-hard": ("sft", "sp-hard", "rf-more", "rf-mixed"),
}
"""Which rows a row is held against, where both are run; those not named: sft and sft-more."""
COVERAGE_RESAMPLES = 200


def main(line: Sequence[str] | None = None) -> None:
    """Command line."""
    wanted = arguments(line)
    torch.set_num_threads(wanted.threads)
    keep = wanted.keep or Path(tempfile.mkdtemp())
    trainer = settings_from(wanted)
    data = material(wanted.folder, trainer.curriculum.fresh, wanted.held_back)
    found: dict[str, list[Measured]] = {}
    policies = wanted.policy or [trained_policy(data, trainer, keep, wanted.device)]
    bases = [kept_policy(policy, keep) for policy in policies]
    for seed in range(wanted.seeds):
        base = bases[seed % len(bases)]
        for name, measured in one_seed(Bench(wanted, trainer, seed, base, data), wanted.rows):
            found.setdefault(name, []).append(measured)
            brief(name, seed, measured, found["sft"][-1])
    rows = [row_of(name, found) for name in ROWS if name in found]
    rows += [not_run(name, data) for name in (*ROUNDS, *RF) if name in wanted.rows and name not in found]
    facts = {
        "dataset": data.name,
        "users": wanted.users or "all",
        "held_back": data.held_back,
        "train_users": wanted.train_users or "all",
        "item": {1: "test", 2: "validation"}[wanted.back],
        "beam": wanted.beam,
        "seeds": wanted.seeds,
        "stages": [stage.model_dump(mode="json") for stage in trainer.curriculum.stages],
        "selfplay": trainer.curriculum.selfplay.model_dump(mode="json"),
        "rows": rows,
    }
    table(rows)
    if wanted.record:
        made = {"command": "python benchmarks/preference_benefit.py " + words(wanted), **origin()}
        wanted.record.write_text(json.dumps(made | {"result": facts}, indent=1) + "\n")
    if wanted.json:
        print(json.dumps(facts))


def trained_policy(data: Material, trainer: TrainerSettings, keep: Path, device: str) -> Path:
    """The base policy of ``data``, trained unless it is there; one for all seeds of what comes after it."""
    made = trainer.tokenization.model_dump_json() + trainer.sft.model_dump_json()
    place = keep / f"base-{data.name}-{manifest_key(made.encode())}"
    lineage = {"leave_out": data.leave_out}
    return base_policy(place, data.items, data.sft_histories, trainer, 0, lineage=lineage, device=device)


def kept_policy(policy: Path, keep: Path) -> Path:
    """A copy of the policy under ``keep``, in a folder named by its content and its version: adapters
    find their base by that, and runs of another policy lie elsewhere."""
    manifest = (policy / "policy.json").read_bytes()
    base = keep / manifest_key(manifest) / "policies" / json.loads(manifest)["version"]
    if not base.is_dir():
        staging = base.with_name(".copying")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(policy, staging)
        staging.rename(base)
    return base


def manifest_key(manifest: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(manifest).hexdigest()[:10]


def one_seed(bench: Bench, rows: Sequence[str]) -> Any:
    """(row, measured) of each row that is wanted, in order; a chain's stages come together."""
    yield "sft", bench.measure(bench.base, "sft")
    for name in ("sft-more", "sdpo", "sp-mixed", "sp-shuffled"):
        if name in rows:
            yield name, bench.measure(bench.flat(name), name)
    if any(name in rows for name in STAGES):
        for name, policy in bench.chain(once=False).items():
            yield name, bench.measure(policy, name)
    if "sp-once" in rows:
        last = list(bench.chain(once=True).items())[-1]
        yield "sp-once", bench.measure(last[1], f"once-{last[0]}")
    if bench.feedback:
        for prefix, names in (("rounds", ROUNDS), ("rf", RF)):
            if any(name in rows for name in names):
                start = bench.base if prefix == "rounds" else list(bench.chain(once=False).values())[-1]
                for name, policy in bench.rounds(prefix, start, rows).items():
                    yield name, bench.measure(policy, name)


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--policy", type=Path, nargs="+", help="Full policies; none: one is trained.")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--users", type=int, default=None, help="Test users, always the same.")
    parser.add_argument("--skip", type=int, default=0, help="Test users left to the choice of settings.")
    parser.add_argument("--train-users", type=int, default=None, help="Users that self-play learns from.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--back", type=int, default=1, choices=(1, 2), help="1: test, 2: validation item.")
    parser.add_argument("--held-back", type=int, default=2, choices=(1, 2), help="Items nothing learns from.")
    parser.add_argument("--beam", type=int, default=100, help="Prefixes a level; Recall@k up to it.")
    parser.add_argument("--settings", type=Path, default=None, help="An align3gr.yaml.")
    parser.add_argument("--sft", nargs="*", default=[], help="Of the policy trained here: epochs=12 ...")
    parser.add_argument("--set", nargs="*", default=[], help="Of every stage: beta=2 learning_rate=1e-4 ...")
    parser.add_argument("--play", nargs="*", default=[], help="Of self-play: negatives=nearest ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--record", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(line)
    if wanted.back > wanted.held_back:
        parser.error("--back 2 looks for the item that --held-back 1 learns from")
    if wanted.policy and len(wanted.policy) not in (1, wanted.seeds):
        parser.error("--policy takes one directory for all seeds, or one for each")
    return wanted


def settings_from(wanted: argparse.Namespace) -> TrainerSettings:
    """The file's settings, or the defaults, with what --sft, --set and --play change."""
    trainer = TrainerSettings()
    if wanted.settings is not None:
        from align3gr.settings import load_settings

        trainer = load_settings(wanted.settings).trainer
    plain = trainer.model_dump(mode="json")
    for pair in wanted.set:
        name, value = pair.split("=")
        for stage in plain["curriculum"]["stages"]:
            stage[name] = json.loads(value)
    for pair in wanted.play:
        name, value = pair.split("=")
        plain["curriculum"]["selfplay"][name] = value
    for pair in wanted.sft:
        name, value = pair.split("=")
        plain["sft"][name] = json.loads(value)
    return TrainerSettings.model_validate(plain)


def named(name: str) -> dict[str, Any]:
    """The row's name, beside the paper's figures where it has such a row."""
    row: dict[str, Any] = {"name": name}
    if name in PAPER:
        row["paper"] = dict(zip(("row", "recall@10", "ndcg@10"), PAPER[name], strict=True))
    return row


def not_run(name: str, data: Material) -> dict[str, Any]:
    """A feedback row where there is nothing to learn it from."""
    return named(name) | {"not_run": TOO_FEW if data.fresh else NO_LEVELS}


def row_of(name: str, found: Mapping[str, list[Measured]]) -> dict[str, Any]:
    """A row's figures, and what it gained over its controls as shares of theirs."""
    row = named(name)
    mine = found[name]
    tables = {metric: np.stack([one.per_user[metric] for one in mine]) for metric in mine[0].per_user}
    bootstrap = Bootstrap(next(iter(tables.values())).shape[1])
    row |= {metric: [one.mean, *one.as_list()] for metric, one in bootstrap.intervals(tables).items()}
    row["coverage"] = float(np.mean([one.shape.coverage for one in mine]))
    row["popularity"] = float(np.mean([one.shape.popularity for one in mine]))
    row["learned"] = [one.learned for one in mine if one.learned]
    for other in CONTROLS.get(name, ("sft", "sft-more")):
        if other in found and other != name:
            row[f"against {other}"] = gains(mine, found[other], bootstrap)
    return row


def gains(mine: list[Measured], others: list[Measured], bootstrap: Bootstrap) -> dict[str, list[float]]:
    """Metric -> [change, low, high], as shares of the other row's mean; paired user by user."""
    found = {}
    for metric in (name for name in METRICS if name in mine[0].per_user):
        less = np.stack([a.per_user[metric] - b.per_user[metric] for a, b in zip(mine, others, strict=True)])
        mean = float(np.mean([other.per_user[metric] for other in others]))
        change = bootstrap.interval(less)
        found[metric] = [change.mean / mean, change.low / mean, change.high / mean]
    found["coverage"] = coverage_change(mine, others)
    return found


def coverage_change(mine: list[Measured], others: list[Measured]) -> list[float]:
    """[change, low, high] of the number of items shown, as a share; users are resampled, paired."""
    random = np.random.default_rng(0)
    users = len(mine[0].lists)

    def change(chosen: IntArray) -> float:
        sizes = [
            (len(np.unique(a.lists[chosen])), len(np.unique(b.lists[chosen])))
            for a, b in zip(mine, others, strict=True)
        ]
        return sum(size[0] for size in sizes) / sum(size[1] for size in sizes) - 1

    resampled = [change(random.integers(0, users, size=users)) for _ in range(COVERAGE_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return [change(np.arange(users)), float(low), float(high)]


def brief(name: str, seed: int, measured: Measured, base: Measured) -> None:
    """One line a measured row, as it comes."""
    means = {metric: values.mean() for metric, values in measured.per_user.items()}
    changes = " ".join(
        f"{metric} {means[metric]:.4f} ({means[metric] / base.per_user[metric].mean() - 1:+.1%})"
        for metric in METRICS
        if metric in means
    )
    coverage = measured.shape.coverage / base.shape.coverage - 1
    say(f"seed {seed} {name:12} {changes} coverage {measured.shape.coverage:.3f} ({coverage:+.1%})")


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """For people."""
    for row in rows:
        if "not_run" in row:
            say(f"{row['name']:16} not run: {row['not_run']}")
            continue
        say(f"{row['name']:16} N@10 {row['ndcg@10'][0]:.4f} R@10 {row['recall@10'][0]:.4f}")
        for other, changes in row.items():
            if other.startswith("against "):
                cells = [
                    f"{name} {m:+.1%} [{low:+.1%}, {high:+.1%}]" for name, (m, low, high) in changes.items()
                ]
                say(f"    {other}: {'; '.join(cells)}")


def words(wanted: argparse.Namespace) -> str:
    """The command line that gives these rows, without paths of this machine."""
    parts = [
        f"{wanted.folder.resolve().name}/",
        *(["--policy " + " ".join(["DIR"] * len(wanted.policy))] if wanted.policy else []),
    ]
    parts += [f"--seeds {wanted.seeds} --back {wanted.back} --beam {wanted.beam}"]
    parts += [f"--settings {wanted.settings.name}"] if wanted.settings else []
    parts += [f"--held-back {wanted.held_back}"] if wanted.held_back == 1 else []
    parts += [f"--users {wanted.users}"] if wanted.users else []
    parts += [f"--skip {wanted.skip}"] if wanted.skip else []
    parts += [f"--train-users {wanted.train_users}"] if wanted.train_users else []
    parts += [f"--rows {' '.join(wanted.rows)}"] if tuple(wanted.rows) != ROWS else []
    parts += [f"--sft {' '.join(wanted.sft)}"] if wanted.sft else []
    parts += [f"--set {' '.join(wanted.set)}"] if wanted.set else []
    parts += [f"--play {' '.join(wanted.play)}"] if wanted.play else []
    return " ".join(parts)


if __name__ == "__main__":
    main()
