"""The offline benchmark: Beauty or Instruments, one row a model, both columns, beside the paper's figures.

    python benchmarks/offline.py beauty/ [--rows popularity rules ...] [--seeds 3] [--json] [--keep DIR]
        [--record FILE] [--back 1] [--users N] [--python PYTHON] [--settings FILE] [--device cpu]

FOLDER holds ``sequences.jsonl.gz`` and ``items.jsonl.gz``. Protocol: leave one out. Every model is fitted to
each history without its last two items; the last item (``--back 2``: the one before, to tune on) is to be
found in the whole catalogue after all items before it. Every user, or ``--users`` of them. Recall and NDCG
come from trainer.metrics, in two columns that are never mixed: all items (as the printed tables), seen items
left out (as the product serves). Intervals hold 95% of bootstrap resamples over users and seeds.

``--keep``: a finished run is kept there and not done again. ``--record``: rows are merged into that file by
name, each with command, commit, device, date and seconds. ``--json``: the last line is one object.
"""

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from align3gr.console import say
from align3gr.settings import load_settings
from benchmarks.baselines.models import PARTS, RowUnavailableError, Shelf
from benchmarks.baselines.policies import POLICIES, measured_policy, policy_key
from benchmarks.baselines.reading import Dataset, read
from benchmarks.measuring import origin
from trainer.metrics import COLUMN_WORDS, COLUMNS, Bootstrap, ListShape, Ranked, rank_scores
from trainer.settings import TrainerSettings
from trainer.tokenization.text import item_texts

ROOT = Path(__file__).resolve().parent.parent
PRINTED = json.loads((ROOT / "benchmarks" / "baselines" / "paper.json").read_text())
DEPTH = 10
BEAMS = (20, 100)
SHOWN = ("recall@1", "recall@5", "recall@10", "recall@50", "recall@100", "ndcg@5", "ndcg@10")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    words: str
    paper: str | None = None
    """The printed row beside which it stands."""
    seeded: bool = False
    why_not: str | None = None
    """Why the row is not run; none: it is."""


LARGE = "a 7B model; no such hardware here"
T5 = "its own T5 with prompts of its own; no setting of ours"
ROWS = (
    Row("popularity", "what most training histories hold"),
    Row("itemknn", "item-based neighbours, cosine, shrunk"),
    Row("rules", "sequential rules (trainer/sft/votes.py)"),
    Row("als", "MF: implicit's ALS", "MF", seeded=True),
    Row("bpr", "MF: implicit's BPR", "MF", seeded=True),
    Row("sasrec", "SASRec, full cross-entropy (trainer/sft/sasrec.py)", "SASRec", seeded=True),
    Row("mixture", ".6 SASRec + .4 rules", seeded=True),
    Row("fusion", "log p(SASRec) + 2 log(1 + 20 rules)", seeded=True),
    Row("teacher", "SASRec, rules, shared users, like texts: what ours learns from", seeded=True),
    Row("tiger-like", "our pipeline: codes of text alone, next item only", "TIGER", seeded=True),
    Row(
        "letter-tiger-like",
        "our pipeline: codes of text and behaviour, next item",
        "LETTER-TIGER",
        seeded=True,
    ),
    Row("ours", "our pipeline as its settings are", "Align3GR", seeded=True),
    Row("ours-mean-start", "the same, its codec's tokens started as any others", "Align3GR", seeded=True),
    Row(
        "lightgcn",
        "",
        "LightGCN",
        why_not="cornac 3.0.1 wants dgl 1.1 and torch 2.0 for it; RecBole was not tried",
    ),
    Row("caser", "", "Caser", why_not="not in implicit, cornac or RecTools; RecBole was not tried"),
    Row("hgn", "", "HGN", why_not="not in implicit, cornac or RecTools; RecBole was not tried"),
    Row("bert4rec", "", "BERT4Rec", why_not="in cornac 3.0.1, not run yet"),
    Row("bigrec", "", "BIGRec", why_not=LARGE),
    Row("p5-semid", "", "P5-SemID", why_not=T5),
    Row("p5-cid", "", "P5-CID", why_not=T5),
    Row("lc-rec", "", "LC-Rec", why_not=LARGE),
    Row("letter-lc-rec", "", "LETTER-LC-Rec", why_not=LARGE),
    Row("eager-llm", "", "EAGER-LLM", why_not=LARGE),
)
CHEAP = ("popularity", "itemknn", "rules")


@dataclass(frozen=True)
class Run:
    """A row under one seed."""

    columns: dict[str, Ranked]
    train_seconds: float
    """Of training (and, for a policy, tokenization)."""
    seconds: float
    """Of all, with measuring."""
    origin: dict[str, str]
    """Commit, device and date."""


def main(line: Sequence[str] | None = None) -> None:
    """Command line."""
    wanted = arguments(line)
    torch.set_num_threads(wanted.threads)
    data = read(wanted.folder, back=wanted.back, users=wanted.users)
    keep = wanted.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    trainer = settings_from(wanted.settings)
    shelf = Shelf(
        data.training,
        data.n_items,
        trainer.sft.sasrec,
        trainer.sft.teacher,
        item_texts(data.items),
        later=2 - wanted.back,
        device=wanted.device,
        python=wanted.python,
    )
    rows = []
    for row in ROWS:
        if row.why_not is None and row.name in wanted.rows:
            rows.append(measured(row, data, shelf, keep, wanted, trainer))
        elif row.why_not is not None and not wanted.only:
            rows.append(facts_of(row, data.name) | {"not_reproduced": row.why_not})
    table(rows, data)
    facts = {
        "dataset": data.name,
        "protocol": f"leave one out, item {wanted.back} from the end, full catalogue",
        "users": len(data.targets),
        "items": data.n_items,
        "paper": PRINTED["source"],
        "columns": COLUMN_WORDS,
        "metrics": "[mean, low, high] with 95% bootstrap intervals over users and seeds",
    }
    if wanted.record:
        record(wanted.record, facts, rows)
    if wanted.json:
        print(json.dumps(facts | {"rows": rows}))


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    names = [row.name for row in ROWS if row.why_not is None]
    parser.add_argument("--rows", nargs="*", default=list(CHEAP), choices=[*names, "all"])
    parser.add_argument("--only", action="store_true", help="No rows that are not reproduced.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--back", type=int, default=1, choices=(1, 2), help="1: test item, 2: validation item."
    )
    parser.add_argument("--users", type=int, default=None, help="Only so many, always the same.")
    parser.add_argument(
        "--beam", type=int, nargs="+", default=list(BEAMS), help="Of our policies; Recall@k up to the widest."
    )
    parser.add_argument("--python", default=None, help="Python with the libraries of baselines/factors.py.")
    parser.add_argument(
        "--settings", type=Path, default=None, help="An align3gr.yaml, for ours and its like."
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--record", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    wanted = parser.parse_args(line)
    if "all" in wanted.rows:
        wanted.rows = names
    if max(wanted.beam) < DEPTH:
        parser.error(f"a beam of {max(wanted.beam)} holds no list of {DEPTH}; give a wider one, such as 20")
    return wanted


def settings_from(file: Path | None) -> TrainerSettings:
    """The trainer's part of a settings file; without one the defaults."""
    return TrainerSettings() if file is None else load_settings(file).trainer


def measured(
    row: Row, data: Dataset, shelf: Shelf, keep: Path, wanted: argparse.Namespace, trainer: TrainerSettings
) -> dict[str, Any]:
    """Facts of a row over its seeds, or why it cannot be run."""
    runs = []
    for seed in range(wanted.seeds if row.seeded else 1):
        scope = (data.name, wanted.back, wanted.users or "all", row.name, seed)
        file = keep / ("-".join([*map(str, scope), *settings_key(row.name, trainer, wanted.beam)]) + ".npz")
        if not file.is_file():
            try:
                run = one_run(row, seed, data, shelf, keep, wanted, trainer)
            except RowUnavailableError as error:
                return facts_of(row, data.name) | {"not_reproduced": str(error)}
            save(file, run)
        runs.append(load(file))
        means = runs[-1].columns["unseen"].means
        say(
            f"{row.name} seed {seed}: seen left out R@10 {means['recall@10']:.4f} N@10 {means['ndcg@10']:.4f}"
        )
    facts = facts_of(row, data.name) | {"seeds": len(runs)}
    boot = Bootstrap(len(data.targets))
    for column in COLUMNS:
        metrics = runs[0].columns[column].per_user
        tables = {name: np.stack([run.columns[column].per_user[name] for run in runs]) for name in metrics}
        found = boot.intervals(tables)
        facts[column] = {
            name: [round(value, 5) for value in (one.mean, one.low, one.high)] for name, one in found.items()
        }
        if len(runs) > 1:
            of_seeds = {name: values.mean(axis=1).std(ddof=1) for name, values in tables.items()}
            facts[column]["sd_of_seeds"] = {name: round(float(sd), 5) for name, sd in of_seeds.items()}
        shapes = [asdict(run.columns[column].shape) for run in runs]
        facts[column] |= {name: round(float(np.mean([one[name] for one in shapes])), 5) for name in shapes[0]}
    return facts | {
        "train_seconds": round(float(np.mean([run.train_seconds for run in runs])), 1),
        "seconds": round(sum(run.seconds for run in runs), 1),
        "command": command_line(row.name, wanted),
        **runs[-1].origin,
    }


def settings_key(name: str, trainer: TrainerSettings, beams: Sequence[int]) -> list[str]:
    """What besides data and seed a kept run of this row depends on."""
    if name in POLICIES:
        return [policy_key(name, trainer), *map(str, beams)]
    if name in ("sasrec", *PARTS):
        made_of = trainer.sft.sasrec.model_dump_json()
        made_of += trainer.sft.teacher.model_dump_json() if name == "teacher" else ""
        return [hashlib.sha256(made_of.encode()).hexdigest()[:8]]
    return []


def one_run(
    row: Row,
    seed: int,
    data: Dataset,
    shelf: Shelf,
    keep: Path,
    wanted: argparse.Namespace,
    trainer: TrainerSettings,
) -> Run:
    """Fit and measure."""
    began = time.perf_counter()
    if row.name in POLICIES:
        columns, seconds = measured_policy(
            row.name, seed, data, trainer, keep, beams=wanted.beam, depth=DEPTH, device=wanted.device
        )
    else:
        model, seconds = shelf.model(row.name, seed)
        columns = rank_scores(model, data.histories, data.targets, data.order, depth=DEPTH)
    facts = origin() | {"device": device(wanted)}
    return Run(columns, seconds, time.perf_counter() - began, facts)


def facts_of(row: Row, dataset: str) -> dict[str, Any]:
    """Name, words, and the printed figures where the paper has them for this data set."""
    values = PRINTED.get(dataset, {}).get(row.paper)
    printed = dict(zip(PRINTED["metrics"], values, strict=True)) if values else None
    return {"name": row.name, "words": row.words, "paper_row": row.paper, "paper": printed}


def save(file: Path, run: Run) -> None:
    """Keep a run: every user's figures."""
    arrays = {
        f"{column}/{name}": values.astype(np.float32)
        for column, ranked in run.columns.items()
        for name, values in ranked.per_user.items()
    }
    shapes = {column: asdict(ranked.shape) for column, ranked in run.columns.items()}
    kept = {"train_seconds": run.train_seconds, "seconds": run.seconds, "origin": run.origin}
    facts = json.dumps({"shapes": shapes, **kept})
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        np.savez_compressed(out, facts=np.array(facts), **arrays)
    part.rename(file)


def load(file: Path) -> Run:
    """What ``save`` kept."""
    with np.load(file) as arrays:
        facts = json.loads(str(arrays["facts"]))
        tables: dict[str, dict[str, Any]] = {column: {} for column in COLUMNS}
        for name in arrays.files:
            if name != "facts":
                column, metric = name.split("/")
                tables[column][metric] = arrays[name].astype(np.float64)
    columns = {column: Ranked(tables[column], ListShape(**facts["shapes"][column])) for column in COLUMNS}
    return Run(columns, facts["train_seconds"], facts["seconds"], facts["origin"])


def record(file: Path, facts: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Merge the rows into ``file`` by name, in the order of ROWS; a row measured before is not unlearned."""
    old = json.loads(file.read_text())["rows"] if file.is_file() else []
    found = {row["name"]: row for row in old}
    for row in rows:
        if "not_reproduced" not in row or "not_reproduced" in found.get(row["name"], {"not_reproduced": ""}):
            found[row["name"]] = row
    ordered = [found[row.name] for row in ROWS if row.name in found]
    file.write_text(json.dumps({**facts, "rows": ordered}, indent=1) + "\n")


def table(rows: list[dict[str, Any]], data: Dataset) -> None:
    """For people: both columns, the paper's figures under the one they belong to."""
    for column in COLUMNS:
        say("")
        say(f"{data.name}, {COLUMN_WORDS[column]}, {len(data.targets)} users, {data.n_items} items")
        say(f"{'':20}" + "".join(f"{name:>12}" for name in SHOWN))
        for row in rows:
            if column in row:
                found = row[column]
                cells = "".join(f"{found[name][0]:>12.4f}" if name in found else f"{'':12}" for name in SHOWN)
                low, high = row[column]["recall@10"][1:]
                say(f"{row['name']:20}{cells}   R@10 [{low:.4f}, {high:.4f}]")
            if row["paper"] and column == "all_items":
                cells = "".join(f"{row['paper'].get(name, ''):>12}" for name in SHOWN)
                why = f"   not reproduced: {row['not_reproduced']}" if "not_reproduced" in row else ""
                say(f"{row['paper_row'] + ', printed':20}{cells}{why}")


def command_line(name: str, wanted: argparse.Namespace) -> str:
    """What gives this row."""
    parts = [f"python benchmarks/offline.py {wanted.folder.name}/ --rows {name} --seeds {wanted.seeds}"]
    parts += [f"--back {wanted.back}"] if wanted.back != 1 else []
    parts += [f"--users {wanted.users}"] if wanted.users else []
    parts += (
        [f"--settings {wanted.settings.name}"] if wanted.settings and name in (*POLICIES, "teacher") else []
    )
    if name in POLICIES and tuple(wanted.beam) != BEAMS:
        parts += [f"--beam {' '.join(map(str, wanted.beam))}"]
    parts += ["--python PYTHON"] if name in ("als", "bpr") else []
    parts += [f"--device {wanted.device}"] if wanted.device != "cpu" else []
    return " ".join(parts)


def device(wanted: argparse.Namespace) -> str:
    """What it ran on, in words."""
    if wanted.device.startswith("cuda"):
        return torch.cuda.get_device_name(wanted.device)
    return f"CPU, {platform.machine()}, {wanted.threads} thread(s)"


if __name__ == "__main__":
    main()
