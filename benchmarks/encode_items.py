"""A catalogue of 1,000,000 items streamed through a codec's encoder: text in, codes out, in bounded memory.

    python benchmarks/encode_items.py [--json] [--items 1000000]

The items are made up as they are asked for (title, two categories, a few words: about 20 words each), from
words that follow Zipf's law. A codec is fitted to 20,000 of them; its ``ItemEncoder`` is then read from its
directory in a process of its own, with one thread, which takes its texts from a generator and drops the codes
after counting them. What making the texts up takes is measured apart and taken off. The text encoder is also
run as it was before (one text at a time), on the same texts in the same run. Bound: peak memory at most 1 GB.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import clocks, peak_gb, since

FITTED = 20_000
COMPARED = 50_000
WORDS = 30_000
PEAK_GB = 1.0


def main() -> int:
    """Measure, print, and say by the exit code whether memory stayed within its bound."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options.add_argument("--items", type=int, default=1_000_000, help="items to encode")
    options.add_argument("--child", metavar="CODEC", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        print(json.dumps(encode(Path(given.child), given.items)))
        return 0
    with tempfile.TemporaryDirectory(prefix="encode-") as folder:
        seconds = fit(Path(folder) / "codec")
        command = [sys.executable, __file__, "--child", f"{folder}/codec", "--items", str(given.items)]
        # Most of the work is a loop in Python; threads that wait for it would be counted as work.
        one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread)
    facts = json.loads(done.stdout.splitlines()[-1]) | {
        "seconds_to_fit": round(seconds, 1),
        "device": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    facts["within_bounds"] = facts["peak_gb"] <= PEAK_GB
    if given.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<28}{value}")
    return 0 if facts["within_bounds"] else 1


def fit(codec: Path) -> float:
    """Fit a codec to the first items, from their text alone; seconds it took."""
    import pyarrow as pa

    from trainer.settings import TokenizationSettings
    from trainer.tokenization import fit_codec

    started = time.perf_counter()
    items = pa.table({"item_id": [f"i{n}" for n in range(FITTED)], "text": list(islice(texts(0), FITTED))})
    fit_codec(items, [], TokenizationSettings(steps=100), codec)
    return time.perf_counter() - started


def encode(codec: Path, items: int) -> dict:  # type: ignore[type-arg]
    """Stream ``items`` texts through the encoder of ``codec``; figures of this process."""
    from policies.quantizer import ItemEncoder

    encoder = ItemEncoder.load(codec / "quantizer")
    making = clocks()
    for _ in islice(texts(1), items):
        pass
    made = since(making)
    counts = [np.zeros(size, dtype=np.int64) for size in encoder.quantizer.sizes]
    started, total = clocks(), 0
    for codes in encoder.stream(islice(texts(1), items)):
        total += len(codes)
        for level, count in enumerate(counts):
            count += np.bincount(codes[:, level], minlength=len(count))
    taken = since(started)
    peak = peak_gb()
    seconds = {clock: taken[clock] - made[clock] for clock in taken}
    return {
        "items": total,
        "items_per_s": round(total / seconds["seconds"]),
        "peak_gb": round(peak, 3),
        "items_per_cpu_s": round(total / seconds["cpu_seconds"]),
        "seconds": round(seconds["seconds"], 2),
        "seconds_making_texts": round(made["seconds"], 2),
        "levels_used": [round(float((count > 0).mean()), 4) for count in counts],
        **against_one_by_one(encoder.text, list(islice(texts(2), COMPARED))),
    }


def against_one_by_one(encoder, several: list[str]) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """The text encoder beside its earlier loop over texts: both twice, in turn; CPU time."""
    spent = {"now": 0.0, "before": 0.0}
    for _ in range(2):
        started = clocks()
        now = encoder.encode(several)
        spent["now"] += since(started)["cpu_seconds"]
        started = clocks()
        before = one_by_one(encoder, several)
        spent["before"] += since(started)["cpu_seconds"]
    return {
        "texts_per_cpu_s": round(2 * len(several) / spent["now"]),
        "texts_per_cpu_s_one_by_one": round(2 * len(several) / spent["before"]),
        "texts_ratio": round(spent["before"] / spent["now"], 2),
        "texts_differ_by": float(np.abs(now - before).max()),
    }


def one_by_one(encoder, several: list[str]) -> np.ndarray:  # type: ignore[no-untyped-def, type-arg]
    """TF-IDF and projection a text at a time: what ``TfidfEncoder.encode`` was."""
    from policies.text import terms

    out = np.zeros((len(several), encoder.width), dtype=np.float32)
    for row, text in enumerate(several):
        known = (term for term in terms(text, encoder.ngrams) if term in encoder.vocabulary)
        counts = Counter(encoder.vocabulary[term] for term in known)
        if not counts:
            continue
        index = np.fromiter(counts.keys(), dtype=np.int64)
        weight = (1 + np.log(np.fromiter(counts.values(), dtype=np.float64))) * encoder.idf[index]
        weight /= np.linalg.norm(weight)
        out[row] = weight.astype(np.float32) @ encoder.components[index]
    norms = np.linalg.norm(out, axis=1, keepdims=True)
    return np.divide(out, norms, out=out, where=norms > 0)


def texts(seed: int) -> Iterator[str]:
    """Made-up items for ever, the same for the same seed; a thousand are held at a time."""
    alphabet = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    spelling = np.random.default_rng(0)  # one language for all seeds
    words = ["".join(spelling.choice(alphabet, length)) for length in spelling.integers(3, 10, WORDS)]
    likely = np.cumsum(1 / np.arange(1, WORDS + 1))
    random = np.random.default_rng(seed + 1)
    while True:
        drawn = np.searchsorted(likely, random.random((1_000, 20)) * likely[-1]).tolist()
        for row in drawn:
            title = " ".join(words[word].title() for word in row[:6])
            yield f"{title}. {words[row[6] % 40]}, {words[row[7] % 400]}. " + " ".join(
                words[word] for word in row[8:]
            )


if __name__ == "__main__":
    sys.exit(main())
