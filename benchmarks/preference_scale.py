"""A preference stage of many samples: time, samples/s, memory, and whether ten times as many take ten times.

    python benchmarks/preference_scale.py [--samples 10000,100000] [--data 10000,100000] [--json]

Synthetic samples (histories of up to 20 items, one chosen, up to 20 rejected) on a policy of a preset's size,
one epoch, batches of 64, float32. A stage is ``run_stage`` whole: reading the table, the reference's
log-probabilities, every step, writing the policy. Every size runs in a process of its own, in CPU seconds
(device: clock); what loading takes is in none of them.

``--data``: the same without the model, which is what could grow faster than its input: token ids,
fingerprint, batches, packing, and what they hold in memory. The goal, for both: 100,000 take at most 11 times
10,000. Where 100,000 are too many for the machine, ``--samples 200,2000`` measures the same of a fiftieth.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch

from align3gr.console import say
from benchmarks.measuring import peak_mb
from policies.codec import ScidCodec
from policies.policy import Policy, write_policy
from policies.scoring import pack
from trainer.preference.samples import encode_samples
from trainer.preference.stage import StageRun, run_stage
from trainer.settings import PreferenceSettings, StageSettings
from trainer.sft.presets import open_backbone

SIZES, ITEMS = (256, 256, 256), 10_000
STAGE = StageSettings(name="scale", data="easy", epochs=1)
SETTINGS = PreferenceSettings(stages=(STAGE,))


def main() -> None:
    """Run the benchmark from the command line."""
    wanted = arguments()
    if wanted.run:
        torch.set_num_threads(wanted.threads)
        logging.disable(logging.WARNING)
        print(json.dumps({"stage": stage_of, "data": data_of}[wanted.run](wanted, wanted.samples[0])))
        return
    facts: dict[str, Any] = {"backbone": wanted.backbone, "threads": wanted.threads}
    for what, sizes in (("stage", wanted.samples), ("data", wanted.data)):
        rows = [measured(wanted, what, size) for size in sizes]
        for row in rows:
            say(
                f"{what:6}{row['samples']:9,} samples {row['seconds']:9.2f} s "
                f"{row['samples_per_s']:9.1f} samples/s  peak {row['peak_mb']:,.0f} MB"
            )
        facts[what] = rows
        if len(rows) > 1:
            facts[f"{what}_ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
            facts[f"{what}_size_ratio"] = rows[-1]["samples"] / rows[0]["samples"]
            more, longer = facts[f"{what}_size_ratio"], facts[f"{what}_ratio"]
            say(f"{what}: {more:.0f} times as many samples take {longer:.2f} times as long")
    if wanted.json:
        print(json.dumps(facts))


def measured(wanted: argparse.Namespace, what: str, size: int) -> dict[str, Any]:
    """One size in a process of its own."""
    command = [sys.executable, __file__, "--run", what, "--samples", str(size), "--backbone", wanted.backbone]
    command += ["--threads", str(wanted.threads), "--device", wanted.device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stage_of(wanted: argparse.Namespace, size: int) -> dict[str, Any]:
    """A whole stage."""
    with tempfile.TemporaryDirectory() as place:
        policy, out, first = policy_in(Path(place), wanted.backbone), Path(place) / "stage", [0.0]
        table, clock = table_of(size), clock_of(wanted.device)

        def observe(done: int, _: int) -> None:
            if done == 1:
                first[0] = clock()

        began = clock()
        run_stage(policy, table, STAGE, SETTINGS, StageRun(out, "v2", 0, wanted.device, observe=observe))
        ended = clock()
    return {
        "samples": size,
        "seconds": ended - began,
        "until_first_step_s": first[0] - began,
        "samples_per_s": size / (ended - began),
        "peak_mb": peak_mb(),
    }


def data_of(wanted: argparse.Namespace, size: int) -> dict[str, Any]:
    """All of it but the model: encode, name, plan an epoch, pack every batch twice (reference and step)."""
    with tempfile.TemporaryDirectory() as place:
        tokens = Policy.load(policy_in(Path(place), wanted.backbone)).tokens
    table, held = table_of(size), peak_mb()
    began = time.process_time()
    samples = encode_samples(table, tokens, SETTINGS.max_rejected)
    encoded = time.process_time()
    samples.fingerprint  # noqa: B018 - what naming the references costs
    plans = [*samples.by_length(SETTINGS.micro_batch)]
    plans += samples.epoch(SETTINGS.batch_size, np.random.default_rng(0))
    planned = time.process_time()
    for batch in plans:
        pack([samples.prompts[n] for n in batch], [samples.answers[n] for n in batch], tokens.pad)
    ended = time.process_time()
    return {
        "samples": size,
        "seconds": ended - began,
        "encode_s": encoded - began,
        "plan_s": planned - encoded,
        "pack_s": ended - planned,
        "samples_per_s": size / (ended - began),
        "peak_mb": peak_mb(),
        "rise_mb": peak_mb() - held,
    }


def policy_in(place: Path, backbone: str) -> Path:
    """A policy of the preset with random weights."""
    random = np.random.default_rng(0)
    codes = np.stack(
        np.unravel_index(random.choice(int(np.prod(SIZES)), ITEMS, replace=False), SIZES), axis=1
    )
    codec = ScidCodec([f"i{row}" for row in range(ITEMS)], codes, SIZES, quantizer_hash="drawn")
    made = open_backbone(backbone, codec, ["a lamp"], text_vocabulary=None, seed=0)
    write_policy(
        place / "v1", version="v1", model=made.model, tokenizer=made.tokenizer, codec=codec,
        popularity=codec.item_ids,
    )  # fmt: skip
    return place / "v1"


def table_of(size: int) -> pa.Table:
    """Samples as a dataset's stage has them: histories of 0 to 20 items, 1 to 20 rejected."""
    random = np.random.default_rng(1)
    names = np.array([f"i{row}" for row in range(ITEMS)])

    def lists(counts: np.ndarray[Any, Any]) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        drawn = names[random.integers(0, ITEMS - 1, offsets[-1])]  # never the last item, which is chosen
        return pa.ListArray.from_arrays(offsets, pa.array(drawn))

    return pa.table(
        {
            "sample_id": [f"s{number}" for number in range(size)],
            "history": lists(random.integers(0, 21, size)),
            "chosen": pa.array([names[-1]] * size),
            "rejected": lists(random.integers(1, 21, size)),
        }
    )


def clock_of(device: str) -> Any:
    """CPU seconds, or the clock's for a device that works beside the CPU."""
    return time.process_time if device == "cpu" else time.perf_counter


def arguments() -> argparse.Namespace:
    """The command line."""

    def sizes(text: str) -> list[int]:
        return [int(one) for one in text.split(",") if one]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=sizes, default=[10_000, 100_000], help="of whole stages")
    parser.add_argument(
        "--data", type=sizes, default=[10_000, 100_000], help="without the model; '' for none"
    )
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", choices=["stage", "data"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
