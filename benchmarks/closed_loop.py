"""The closed loop against its rivals, in worlds where the truth is known: liked rate by round.

    python benchmarks/closed_loop.py --world jester --folder jester/ [--seeds 5] [--rounds 8] [--json]
    python benchmarks/closed_loop.py --world demo [--plot loop.png] [--keep DIR] [--out FILE]

Arms: *rfdpo*, the product's rounds; *frozen*, the base policy as SFT left it; *sft_likes*, the same rounds
whose loss is SFT on the liked items (same steps, its own feedback); *bandit*, LinUCB; *popularity*, most
liked so far in the rfdpo arm; *oracle*, the truth; *random*. Every arm that learns serves the same users in
the same rounds and hears what they make of its own slates. Judged on users that no round learns from, one
slate each, their histories fixed and nothing used up, by the truth and without a draw.

*ceiling*: ridge regression from the judges' kind of history to the truth, fitted to everything that all
learners think of all items. ``gap_closed``: (rfdpo - frozen) / (oracle - frozen) in the last round;
``reachable_gap_closed``: the same with the ceiling in the oracle's place.

``--keep``: a finished seed is kept there and not done again. ``--out``: the result is kept in that file under
the world's name, with command, commit, device and date. ``--json``: the last line is one object
[rfdpo, frozen, sft_likes, bandit, popularity, oracle, random, ceiling by round; gap_closed; seconds].
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from align3gr.console import say
from benchmarks.loop.arms import Arm, LoopOptions
from benchmarks.loop.bandit import LinUcb
from benchmarks.loop.worlds import LoopWorld, demo, jester
from benchmarks.measuring import circumstances, record

LEARNING = ("rfdpo", "sft_likes")
LEVELS = ("rfdpo", "frozen", "sft_likes", "bandit", "popularity", "oracle", "random", "ceiling")


def main(line: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("jester", "demo"), default="demo")
    parser.add_argument("--folder", type=Path, default=None, help="Of jester: ratings.npz, jokes.jsonl.gz.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=301)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--served", type=int, default=2000, help="Learners that get a slate in a round.")
    parser.add_argument("--learners", type=int, default=None)
    parser.add_argument("--judges", type=int, default=1000, help="Of jester.")
    parser.add_argument("--stage", type=json.loads, default={}, help="JSON: settings of all stages.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(line)
    if wanted.world == "jester" and wanted.folder is None:
        parser.error("--world jester needs --folder with ratings.npz and jokes.jsonl.gz")
    logging.disable(logging.WARNING)
    torch.set_num_threads(wanted.threads)
    keep = wanted.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    runs = []
    for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
        options = LoopOptions(seed, rounds=wanted.rounds, served=wanted.served)
        options = LoopOptions(
            **{**asdict(options), "stage": tuple((dict(options.stage) | wanted.stage).items())}
        )
        stage = hashlib.sha256(json.dumps(wanted.stage, sort_keys=True).encode()).hexdigest()[:8]
        file = keep / f"{wanted.world}-{seed}-{wanted.rounds}-{wanted.served}-{wanted.learners}-{stage}.json"
        if not file.is_file():
            world = (
                jester(wanted.folder, seed, learners=wanted.learners, judges=wanted.judges)
                if wanted.world == "jester"
                else demo(seed)
            )
            file.write_text(json.dumps(run(world, options)))
        runs.append(json.loads(file.read_text()))
    facts = {"world": wanted.world, **summary(runs), "seconds": round(time.perf_counter() - began, 1)}
    table(facts)
    if wanted.plot:
        plot(facts, wanted.plot)
    if wanted.out:
        record(wanted.out, wanted.world, circumstances(line) | facts)
    if wanted.json:
        print(json.dumps(facts))


def run(world: LoopWorld, options: LoopOptions) -> dict[str, Any]:
    """All arms under one seed: name -> liked rate after 0, 1, .. rounds (constant where nothing changes)."""
    oracle, ceiling, chance = world.oracle, world.ceiling, world.chance
    say(f"seed {options.seed}: oracle {oracle:.4f}, ceiling {ceiling:.4f}, chance {chance:.4f}")
    place = Path(tempfile.mkdtemp(prefix="closed-loop-"))
    try:
        arms = {name: Arm(name, place / name, world, options, say) for name in LEARNING}
        arms["rfdpo"].begin()
        arms["sft_likes"].begin_as(arms["rfdpo"])
        frozen = arms["rfdpo"].judge()
        say(f"frozen {frozen:.4f}")
        found: dict[str, Any] = {name: [frozen] for name in LEARNING}
        found["popularity"] = [popular(world, arms["rfdpo"].likes())]
        bandit = LinUcb(world)
        found["bandit"] = [world.worth(bandit.judged())]
        met = world.met[: len(world.learners)].copy()
        facts: dict[str, list[Any]] = {name: [] for name in LEARNING}
        for number in range(1, options.rounds + 1):
            for name in LEARNING:
                figures = arms[name].round(number)
                found[name].append(figures.worth)
                facts[name].append(asdict(figures))
            found["popularity"].append(popular(world, arms["rfdpo"].likes()))
            play(world, bandit, met, options, number)
            found["bandit"].append(world.worth(bandit.judged()))
            say(f"bandit round {number}: {found['bandit'][-1]:.4f}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    still = {"frozen": frozen, "oracle": world.oracle, "random": world.chance, "ceiling": world.ceiling}
    found |= {name: [value] * (options.rounds + 1) for name, value in still.items()}
    return {"seed": options.seed, **found, "rounds": facts}


def play(
    world: LoopWorld,
    bandit: LinUcb,
    met: np.ndarray[Any, np.dtype[np.bool_]],
    options: LoopOptions,
    number: int,
) -> None:
    """One round of the bandit with the users that the other arms serve in it."""
    random = np.random.default_rng([options.seed, 12, number])
    rows = np.sort(random.permutation(len(world.learners))[: options.served])
    slates = bandit.slates(rows, met[rows])
    levels = world.react(rows, slates, random)
    bandit.learn(rows, slates, levels)
    for row, items, marks in zip(rows.tolist(), slates, levels, strict=True):
        met[row, items[marks > -2]] = True


def popular(world: LoopWorld, likes: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Worth of the most liked items for everybody."""
    return world.worth(world.best(np.tile(likes, (len(world.judges), 1)), world.judges))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, by round; shares of the gap over seeds."""
    means = {name: np.mean([one[name] for one in runs], axis=0).round(4).tolist() for name in LEVELS}

    def closed(arm: str, end: str) -> list[float]:
        return [(one[arm][-1] - one["frozen"][0]) / (one[end][0] - one["frozen"][0]) for one in runs]

    return {
        **means,
        "seeds": [one["seed"] for one in runs],
        "by_seed": {
            name: np.round([one[name] for one in runs], 4).tolist()
            for name in ("rfdpo", "sft_likes", "bandit", "popularity")
        },
        "gap_closed": round(float(np.mean(closed("rfdpo", "oracle"))), 4),
        "gap_closed_by_seed": np.round(closed("rfdpo", "oracle"), 4).tolist(),
        "gap_closed_sft_likes": round(float(np.mean(closed("sft_likes", "oracle"))), 4),
        "reachable_gap_closed": round(float(np.mean(closed("rfdpo", "ceiling"))), 4),
        "beats_sft_likes": [one["rfdpo"][-1] > one["sft_likes"][-1] for one in runs],
        "outcomes": [[one["outcome"] for one in each["rounds"]["rfdpo"]] for each in runs],
    }


def table(facts: dict[str, Any]) -> None:
    """Arms by round, for people."""
    rounds = len(facts["rfdpo"])
    print("liked rate     " + " ".join(f"{number:>6}" for number in range(rounds)))
    for name in LEVELS:
        print(f"{name:<14} " + " ".join(f"{value:6.3f}" for value in facts[name]))
    print(
        f"gap to the oracle closed: {facts['gap_closed']:.3f} (SFT on likes "
        f"{facts['gap_closed_sft_likes']:.3f}); to the ceiling: {facts['reachable_gap_closed']:.3f}"
    )


def plot(facts: dict[str, Any], file: Path) -> None:
    """The table as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in LEVELS:
        dashes = "-" if name in ("rfdpo", "sft_likes", "bandit") else "--"
        axes.plot(facts[name], dashes, label=name)
    axes.set(xlabel="round", ylabel="liked rate of the judges' slates", title=facts["world"])
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
