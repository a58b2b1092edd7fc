"""The paper's tokenization ablation: ways to make SCIDs, the same small recommender trained on each.

    python benchmarks/tokenization.py beauty/ [--json] [--rows ...] [--seeds 3] [--epochs 3]
        [--test-users 4000] [--backbone demo] [--jobs 2] [--keep DIR]

FOLDER holds ``sequences.jsonl.gz`` and ``items.jsonl.gz``. Protocol: leave one out. Tokenization and SFT see
every history without its last two items; Recall and NDCG are over the whole catalogue, items already met left
out, beam 20, the last item of the history to be found after all before it. The recommender, its settings and
the test users are the same in every row; codec and recommender share the seed. Six rows are the paper's, one
is ours.

A finished run is kept under ``--keep`` and not done again. ``--json``: the last line is one object [rows:
name, recall@10, ndcg@10, their deviation over seeds, the paper's; collision_rate, users_sharing, auc_end,
cpu_s].
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch

from align3gr.console import say
from policies.policy import Policy
from policies.settings import DecodingSettings
from trainer.cases import leave_one_out
from trainer.evaluation import rank_catalogue
from trainer.settings import AlignmentSettings, CollaborativeSettings, SftSettings, TokenizationSettings
from trainer.sft import train_sft
from trainer.tokenization import fit_codec
from trainer.tokenization.text import item_texts

METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


@dataclass(frozen=True)
class Row:
    """One row of the paper's table (Instruments, R@10 and N@10)."""

    name: str
    users: bool
    collaborative: bool
    u2i: bool
    paper: tuple[float, float] | None
    """Recall@10 and NDCG@10 printed for Instruments; none: a row of ours."""

    def settings(self) -> TokenizationSettings:
        """The product's defaults with parts left out."""
        return TokenizationSettings(
            users=self.users,
            collaborative=CollaborativeSettings(method="din" if self.collaborative else "none"),
            alignment=AlignmentSettings(method="u2i" if self.u2i else "none"),
            without_text="allow",
        )


ROWS = (
    Row("item", False, False, False, (0.1322, 0.0978)),
    Row("item, CF", False, True, False, (0.1346, 0.0991)),
    Row("dual", True, False, False, (0.1390, 0.1032)),
    Row("dual, U2I", True, False, True, (0.1426, 0.1083)),
    Row("dual, CF", True, True, False, (0.1428, 0.1091)),
    Row("dual, CF, U2I", True, True, True, (0.1442, 0.1113)),
    Row("item, CF, U2I", False, True, True, None),
)


@dataclass(frozen=True)
class Task:
    """One training: a row under one seed."""

    row: Row
    seed: int
    folder: Path
    epochs: int
    test_users: int
    backbone: str
    keep: Path

    @property
    def file(self) -> Path:
        """Where its result is kept; named by all that it depends on."""
        parts = (self.row.name, self.seed, self.folder.name, self.epochs, self.test_users, self.backbone)
        return self.keep / ("-".join(str(part).replace(", ", "+") for part in parts) + ".json")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test-users", type=int, default=4000)
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at once, one thread each.")
    parser.add_argument("--keep", type=Path, default=None)
    wanted = parser.parse_args()
    keep = wanted.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    tasks = [
        Task(row, seed, wanted.folder, wanted.epochs, wanted.test_users, wanted.backbone, keep)
        for seed in range(wanted.seeds)
        for row in ROWS
        if row.name in wanted.rows
    ]
    with ProcessPoolExecutor(max_workers=wanted.jobs) as pool:
        results = list(pool.map(run, tasks, chunksize=1))
    rows = [
        summary(row, [result for task, result in zip(tasks, results, strict=True) if task.row is row])
        for row in ROWS
        if row.name in wanted.rows
    ]
    say("")
    say(f"{'':14} {'R@10':>14} {'N@10':>14}   paper R@10 / N@10 (Instruments)")
    for row in rows:
        printed = "not in the paper" if row["paper"] is None else "{:.4f} / {:.4f}".format(*row["paper"])
        say(
            f"{row['name']:14} {row['recall@10']:.4f} +-{row['recall@10_sd']:.4f} "
            f"{row['ndcg@10']:.4f} +-{row['ndcg@10_sd']:.4f}   {printed}"
        )
    if wanted.json:
        facts = {"dataset": wanted.folder.name, "seeds": wanted.seeds, "epochs": wanted.epochs}
        print(
            json.dumps(facts | {"test_users": wanted.test_users, "backbone": wanted.backbone, "rows": rows})
        )


def run(task: Task) -> dict[str, Any]:
    """Codec, recommender and test of one row and seed; from the kept file when it was done before."""
    if task.file.is_file():
        return dict(json.loads(task.file.read_text()))
    torch.set_num_threads(1)
    started = time.process_time()
    items, histories = read(task.folder)
    with tempfile.TemporaryDirectory() as place:
        codec, policy = Path(place) / "codec", Path(place) / "policy"
        report = fit_codec(items, histories, task.row.settings(), codec, seed=task.seed, leave_out=2)
        coded = time.process_time()
        settings = SftSettings(
            backbone=task.backbone,
            epochs=task.epochs,
            seed=task.seed,
            item_tokens=0,
            new_tokens="mean",
            teacher_weight=0.0,
        )
        sft = train_sft(
            codec, [history[:-2] for history in histories], settings, policy, texts=item_texts(items)
        )
        trained = time.process_time()
        whole = {str(user): history for user, history in enumerate(histories)}
        cases = [case for case, _ in leave_one_out(whole)]
        chosen = np.random.default_rng(0).permutation(len(cases))[: task.test_users]
        figures = rank_catalogue(
            Policy.load(policy, settings=DecodingSettings(beam=20, batch=64)),
            [cases[place] for place in sorted(chosen)],
            cutoffs=(5, 10),
        )
    means = figures.means
    result = {metric: means[metric] for metric in METRICS} | {
        "collision_rate": report.collision_rate,
        "users_sharing": report.users_sharing,
        "auc": report.auc,
        "loss": sft.losses[-1],
        "cpu_s": {
            "tokenize": coded - started,
            "sft": trained - coded,
            "test": time.process_time() - trained,
        },
    }
    task.file.write_text(json.dumps(result))
    say(f"{task.row.name} seed {task.seed}: R@10 {means['recall@10']:.4f} N@10 {means['ndcg@10']:.4f}")
    return result


def read(folder: Path) -> tuple[pa.Table, list[list[str]]]:
    """The catalogue and every whole history, oldest first."""
    with gzip.open(folder / "items.jsonl.gz", "rt") as lines:
        items = [json.loads(line) for line in lines]
    with gzip.open(folder / "sequences.jsonl.gz", "rt") as lines:
        histories = [[str(item) for item in json.loads(line)] for line in lines]
    table = pa.table(
        {
            "item_id": [str(item["id"]) for item in items],
            "title": [item.get("title") or "" for item in items],
            "categories": pa.array(
                [(item.get("categories") or [[]])[0] for item in items], pa.list_(pa.string())
            ),
            "text": [item.get("brand") or "" for item in items],
        }
    )
    return table, histories


def summary(row: Row, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with the deviation of the ranking figures."""
    found: dict[str, Any] = {"name": row.name, "paper": row.paper}
    for metric in METRICS:
        values = [result[metric] for result in results]
        found[metric] = statistics.mean(values)
        found[f"{metric}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    found["collision_rate"] = statistics.mean(result["collision_rate"] for result in results)
    found["users_sharing"] = statistics.mean(result["users_sharing"] for result in results)
    found["auc_end"] = statistics.mean(result["auc"].get("end", 0.0) for result in results)
    found["cpu_s"] = statistics.mean(sum(result["cpu_s"].values()) for result in results)
    return found


if __name__ == "__main__":
    main()
