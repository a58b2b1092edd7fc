"""What a codec of real data is worth: fit at the default setting, and everything that is claimed of its ids.

    python benchmarks/scids.py beauty/ [--json] [--seed 0] [--new 0.05] [--settings JSON]

FOLDER holds ``sequences.jsonl.gz`` and ``items.jsonl.gz``; the last two interactions of every user are left
out of everything. With text, a second fit goes without a share ``--new`` of the items, which are then placed
by their text alone. ``--json``: the last line is one object [items, ambiguous, collision_rate, use,
perplexity, users, auc, recall_at_10, category_lift, together_lift, new_item_lift, seconds, cpu_s].
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa

from align3gr.console import say
from benchmarks.tokenization import read
from policies.codec import ScidCodec
from trainer.settings import TokenizationSettings
from trainer.tokenization import fit_codec
from trainer.tokenization.quality import (
    ambiguous_items,
    category_lift,
    met_together,
    new_item_lift,
    together_lift,
)
from trainer.tokenization.text import item_texts

LEFT_OUT = 2
"""Validation and test of the leave-one-out protocol."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--new", type=float, default=0.05)
    parser.add_argument("--settings", type=json.loads, default={})
    wanted = parser.parse_args()
    items, histories = read(wanted.folder)
    settings = TokenizationSettings(**{"without_text": "allow", **wanted.settings})
    with tempfile.TemporaryDirectory() as place:
        facts = fitted(items, histories, settings, wanted.seed, Path(place) / "whole")
        if any(item_texts(items)) and wanted.new > 0:
            facts |= newcomers(items, histories, settings, wanted.seed, wanted.new, Path(place) / "part")
    say(json.dumps(facts, indent=1))
    if wanted.json:
        print(json.dumps(facts))


def fitted(
    items: pa.Table, histories: list[list[str]], settings: TokenizationSettings, seed: int, out: Path
) -> dict[str, Any]:
    """Figures of a codec of the whole catalogue."""
    wall, cpu = time.perf_counter(), time.process_time()
    report = fit_codec(items, histories, settings, out, seed=seed, leave_out=LEFT_OUT)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    codec = ScidCodec.load(out)
    rows = codec.items
    met = met_together(
        [np.array([rows[item] for item in history[:-LEFT_OUT]]) for history in histories], len(codec)
    )
    facts: dict[str, Any] = {
        "items": len(codec),
        "ambiguous": ambiguous_items(codec.codes),
        "sizes": codec.sizes,
        "collision_rate": report.collision_rate,
        "use": report.use,
        "perplexity": report.perplexity,
        "users": {
            "coded": report.users,
            "sizes": report.user_sizes,
            "distinct": report.user_codes_distinct,
            "sharing": report.users_sharing,
            "use": report.user_use,
            "perplexity": report.user_perplexity,
        },
        "auc": report.auc,
        "recall_at_10": report.recall_at_10,
        "switched_at": report.switched_at,
        "together_lift": together_lift(codec.codes, met).as_dict(),
        "seconds": wall,
        "cpu_s": cpu,
    }
    categories = leaves(items)
    if any(label is not None for label in categories):
        facts["category_lift"] = category_lift(codec.codes, categories).as_dict()
    return facts


def newcomers(
    items: pa.Table,
    histories: list[list[str]],
    settings: TokenizationSettings,
    seed: int,
    share: float,
    out: Path,
) -> dict[str, Any]:
    """A codec fitted without some items, and where their text alone puts them."""
    fresh = np.random.default_rng(seed).random(items.num_rows) < share
    known = items.filter(pa.array(~fresh))
    fit_codec(known, histories, settings, out, seed=seed, leave_out=LEFT_OUT)
    codec = ScidCodec.load(out)
    new = items.filter(pa.array(fresh))
    placed = codec.encoder().encode(item_texts(new))
    lift = new_item_lift(codec.codes[:, : placed.shape[1]], leaves(known), placed, leaves(new))
    return {"new_items": new.num_rows, "new_item_lift": lift.as_dict()}


def leaves(items: pa.Table) -> list[str | None]:
    """The last category of each item."""
    return [(categories or [None])[-1] for categories in items.column("categories").to_pylist()]


if __name__ == "__main__":
    main()
