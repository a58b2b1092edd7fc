"""The paper's SFT ablation: the same recommender trained on more and more tasks.

    python benchmarks/sft_ablation.py beauty/ [--json] [--rows ...] [--seeds 3] [--epochs 10] [--users N]
        [--test-users 4000] [--backbone tiny] [--weight 0.05] [--share 1] [--reading 1] [--settings FILE]
        [--device cpu] [--jobs 2] [--keep DIR] [--all-items]

FOLDER holds ``sequences.jsonl.gz`` and ``items.jsonl.gz`` (with titles). Protocol: leave one out. Codec and
SFT see every history without its last two items; the last item is to be found in the whole catalogue after
all before it, beam 20, items already met left out of the lists (``--all-items``: the other column, which the
printed figures belong to). One codec a seed, the same item SCIDs in every row; where users' SCIDs are not
part of a row its prompts have none. Every task of a row has the same ``--weight``.

The paper names its tasks C1-C3 and B1 without saying which they are. ``--reading 1``: preference inference is
B1, all else C1-C3; ``--reading 2``: item text and SCID are B1, all else C1-C3 (docs/base-policy.md).

``--settings``: a JSON file with other settings of SFT than those named here, the same for all rows; without
it there is no teacher, and items have no tokens of their own. A finished run is kept under ``--keep`` and not
done again. ``--json``: the last line is one object [rows: name, tasks, metrics with 95% intervals of
resampled users and seeds, the paper's figures, cpu_s, seconds].
"""

import argparse
import hashlib
import json
import shutil
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
import torch

from benchmarks.tokenization import METRICS, read, say
from policies.codec import ScidCodec
from policies.policy import Policy
from policies.settings import DecodingSettings
from trainer.cases import leave_one_out
from trainer.evaluation import rank_catalogue
from trainer.settings import SftSettings, TaskSettings, TokenizationSettings
from trainer.sft import train_sft
from trainer.sft.tasks import CatalogueText
from trainer.tokenization import fit_codec
from trainer.tokenization.text import item_texts

NEXT_ITEM = ("titles_to_item", "items_to_title", "mixed_history", "intention_to_item")
ITEM_TEXT = ("text_to_item", "item_to_text")
READINGS = {
    1: ((*NEXT_ITEM, *ITEM_TEXT), ("preference",)),
    2: ((*NEXT_ITEM, "preference"), ITEM_TEXT),
}
"""What C1-C3 and B1 are."""
B2 = ("profile_to_user", "user_to_profile")


@dataclass(frozen=True)
class Row:
    """One row of the paper's table (Instruments, all items, R@10 and N@10)."""

    name: str
    groups: int
    """Groups of tasks it has, of (C1-C3, B1, B2)."""
    users: bool
    """Whether users' SCIDs stand in the prompts."""
    paper: tuple[float, float]

    def tasks(self, reading: int) -> tuple[str, ...]:
        """Names of its tasks."""
        return tuple(name for group in (*READINGS[reading], B2)[: self.groups] for name in group)


ROWS = (
    Row("SEQ", 0, False, (0.1329, 0.0982)),
    Row("+C1-C3", 1, False, (0.1344, 0.0988)),
    Row("+B1", 2, False, (0.1399, 0.1045)),
    Row("+user SCID", 2, True, (0.1417, 0.1051)),
    Row("+B2", 3, True, (0.1442, 0.1113)),
)


@dataclass(frozen=True)
class Run:
    """One training: a row under one seed."""

    row: Row
    seed: int
    settings: SftSettings
    folder: Path
    codec: Path
    users: int | None
    test_users: int
    all_items: bool
    device: str
    keep: Path

    @property
    def file(self) -> Path:
        """Where its result is kept; named by all that it depends on."""
        rest = (self.settings.model_dump_json(), self.row.users, self.users, self.test_users, self.all_items)
        key = hashlib.sha256(json.dumps([self.folder.name, *rest]).encode()).hexdigest()[:12]
        return self.keep / f"{self.row.name.replace(' ', '-')}-{self.seed}-{key}.json"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", nargs="*", default=[row.name for row in ROWS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--users", type=int, default=None, help="Histories to train on, the first ones.")
    parser.add_argument("--test-users", type=int, default=4000)
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--weight", type=float, default=0.05, help="Of every task of a row.")
    parser.add_argument("--share", type=float, default=1.0, help="trainer.sft.tasks.share")
    parser.add_argument("--reading", type=int, choices=sorted(READINGS), default=1)
    parser.add_argument("--settings", type=Path, default=None, help="JSON: other settings of SFT.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at once, one thread each.")
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--all-items", action="store_true")
    wanted = parser.parse_args()
    keep = wanted.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row.name in wanted.rows]
    seeds = range(wanted.seeds)
    with ProcessPoolExecutor(max_workers=wanted.jobs) as pool:
        several = [(wanted.folder, keep, seed, wanted.users) for seed in seeds]
        codecs = list(pool.map(codec_of, several, chunksize=1))
        runs = [
            Run(
                row,
                seed,
                settings_of(wanted, row, seed),
                wanted.folder,
                codecs[seed],
                wanted.users,
                wanted.test_users,
                wanted.all_items,
                wanted.device,
                keep,
            )
            for seed in seeds
            for row in rows
        ]
        results = list(pool.map(one_run, runs, chunksize=1))
    table = [
        summary(row, wanted.reading, [r for run, r in zip(runs, results, strict=True) if run.row is row])
        for row in rows
    ]
    column = "all items" if wanted.all_items else "seen items left out"
    say(f"\n{column:22} {'R@10':>24} {'N@10':>24}   paper (Instruments, all items)")
    for found in table:
        recall, ndcg = (
            f"{found[name]:.4f} ({found[f'{name}_low']:.4f} to {found[f'{name}_high']:.4f})"
            for name in ("recall@10", "ndcg@10")
        )
        say(f"{found['name']:22} {recall:>24} {ndcg:>24}   {found['paper'][0]:.4f} / {found['paper'][1]:.4f}")
    if wanted.json:
        facts = {
            name: getattr(wanted, name)
            for name in ("seeds", "epochs", "backbone", "weight", "share", "reading")
        }
        facts |= {"dataset": wanted.folder.name, "column": column, "test_users": wanted.test_users}
        print(json.dumps(facts | {"users": wanted.users, "rows": table}))


def settings_of(wanted: argparse.Namespace, row: Row, seed: int) -> SftSettings:
    """Settings of one run; those of the file first, then what the row and the command say."""
    given = {"item_tokens": 0, "new_tokens": "mean", "teacher_weight": 0.0}
    given |= {} if wanted.settings is None else json.loads(wanted.settings.read_text())
    lengths = given.pop("tasks", {})
    weights = dict.fromkeys(row.tasks(wanted.reading), wanted.weight) | {"share": wanted.share}
    named = {"backbone": wanted.backbone, "epochs": wanted.epochs, "seed": seed}
    return SftSettings(**given | named, tasks=TaskSettings(**lengths | weights))


def codec_of(what: tuple[Path, Path, int, int | None]) -> Path:
    """Fit the codec of a seed, unless it is kept, and one beside it with the same items and no users."""
    folder, keep, seed, users = what
    place = keep / f"codec-{folder.name}-{users or 'all'}-{seed}"
    if not (place / "with-users").is_dir():
        torch.set_num_threads(1)
        items, histories = read(folder)
        shutil.rmtree(place, ignore_errors=True)
        settings = TokenizationSettings(without_text="allow")
        fit_codec(items, histories[:users], settings, place / "fitted", seed=seed, leave_out=2)
        codec = ScidCodec.load(place / "fitted")
        plain = ScidCodec(
            codec.item_ids, codec.codes, codec.sizes, quantizer_hash=f"{codec.quantizer_hash} items alone"
        )
        plain.save(place / "without-users")
        (place / "fitted").rename(place / "with-users")
    return place


def one_run(run: Run) -> dict[str, Any]:
    """Training and test of one row and seed; from the kept file when it was done before."""
    if run.file.is_file():
        return dict(json.loads(run.file.read_text()))
    torch.set_num_threads(1)
    started, cpu = time.perf_counter(), time.process_time()
    items, histories = read(run.folder)
    whole = {str(user): history for user, history in enumerate(histories[: run.users])}
    with tempfile.TemporaryDirectory() as place:
        report = train_sft(
            run.codec / ("with-users" if run.row.users else "without-users"),
            [history[:-2] for history in whole.values()],
            run.settings,
            Path(place) / "policy",
            texts=item_texts(items),
            catalogue=CatalogueText.of(items),
            device=run.device,
        )
        cases = [case for case, _ in leave_one_out(whole)]
        chosen = np.random.default_rng(0).permutation(len(cases))[: run.test_users]
        decoding = DecodingSettings(beam=20, batch=64)
        figures = rank_catalogue(
            Policy.load(Path(place) / "policy", settings=decoding, device=run.device),
            [cases[number] for number in sorted(chosen)],
            cutoffs=(5, 10),
            exclude_seen=not run.all_items,
        )
    result = {
        "per_user": {metric: figures.per_user[metric].round(6).tolist() for metric in METRICS},
        "losses": report.losses,
        "tasks": report.tasks,
        "tokens_per_s": report.tokens_per_s,
        "cpu_s": time.process_time() - cpu,
        "seconds": time.perf_counter() - started,
    }
    run.file.write_text(json.dumps(result))
    means = figures.means
    say(f"{run.row.name} seed {run.seed}: R@10 {means['recall@10']:.4f} N@10 {means['ndcg@10']:.4f}")
    return result


def summary(row: Row, reading: int, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and users, each with the interval that holds 95% of resampled users and seeds."""
    found: dict[str, Any] = {"name": row.name, "tasks": row.tasks(reading), "user_scids": row.users}
    found["paper"] = row.paper
    draw = np.random.default_rng(0)
    for metric in METRICS:
        values = np.array([result["per_user"][metric] for result in results])  # [seeds, users]
        seeds, users = values.shape
        means = [
            values[draw.integers(seeds, size=seeds)].mean(axis=0)[draw.integers(users, size=users)].mean()
            for _ in range(1000)
        ]
        found[metric] = float(values.mean())
        found[f"{metric}_low"], found[f"{metric}_high"] = np.quantile(means, [0.025, 0.975]).tolist()
    for fact in ("cpu_s", "seconds", "tokens_per_s"):
        found[fact] = float(np.mean([result[fact] for result in results]))
    return found


if __name__ == "__main__":
    main()
