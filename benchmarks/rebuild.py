"""Both stages' complete datasets (deduplication, levels in force, two clocks), rebuilt from a whole log.

    python benchmarks/rebuild.py [--json] [--rows 10000000]

An even log of 10,000,000 rows and 200,000 users, a tenth of it, and a skewed one of 50 users with 20,000
events each, all made by DuckDB from hashes. Every build runs in a process of its own, whose peak memory is
what the system says of it. The pandas version (rebuild_pandas.py) runs on the tenth, and must give the same
rows. Bounds: at least 3x pandas, growth from a tenth to the whole at most 12x, peak at most 4 GB in all.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import duckdb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import clocks, peak_gb, since
from features.datasets import PreferenceDataset
from features.log import LOG_SCHEMA, LogSnapshot
from features.settings import FeatureSettings

WATERMARK = datetime(2026, 6, 1, tzinfo=UTC)
"""After the last event: every window has closed."""
SETTINGS = FeatureSettings.model_validate(
    {"duck": {"memory_limit": "2.5GB"}, "dataset": {"max_samples_per_user": 10_000_000}}
)
BOUNDS = {"pandas_ratio": 3.0, "growth": 12.0, "peak_gb": 4.0}


def main() -> int:
    """Measure, print, and say by the exit code whether the bounds hold."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options.add_argument("--rows", type=int, default=10_000_000, help="rows of the even log")
    options.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        print(json.dumps(CHILDREN[given.child[0]](Path(given.child[1]))))
        return 0
    with tempfile.TemporaryDirectory(prefix="rebuild-") as folder:
        facts = measure(Path(folder), given.rows, say=print if not given.json else lambda _: None)
    facts["within_bounds"] = (
        facts["identical"]
        and facts["pandas_ratio"] >= BOUNDS["pandas_ratio"]
        and facts["growth"] <= BOUNDS["growth"]
        and facts["peak_gb"] <= BOUNDS["peak_gb"]
    )
    if given.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:<18}{value}")
    return 0 if facts["within_bounds"] else 1


def measure(folder: Path, rows: int, say) -> dict:  # type: ignore[no-untyped-def]
    """Make the three logs, build from each, compare with pandas on the small one."""
    logs = {
        "tenth": (rows // 10, rows // 500),
        "whole": (rows, rows // 50),
        "skewed": (rows // 10, max(1, rows // 200_000)),
    }
    for name, (log_rows, users) in logs.items():
        make_log(folder / name, log_rows, users)
        say(f"made {name}: {log_rows} rows, {users} users")
    runs = []
    for name in ("tenth", "whole", "skewed", "tenth"):  # the tenth before and after: machines are shared
        runs.append((name, child("build", folder / name)))
        say(f"built {name}: {runs[-1][1]['seconds']:.1f} s, {runs[-1][1]['peak_gb']:.2f} GB")
    built = dict(runs)
    tenth = {clock: (runs[0][1][clock] + runs[3][1][clock]) / 2 for clock in ("seconds", "cpu_seconds")}
    by_pandas = child("pandas", folder / "tenth")
    say(f"pandas on tenth: {by_pandas['seconds']:.1f} s, {by_pandas['peak_gb']:.2f} GB")
    return {
        "seconds": round(built["whole"]["seconds"], 2),
        "peak_gb": round(max(built["whole"]["peak_gb"], built["skewed"]["peak_gb"]), 3),
        "growth": round(built["whole"]["seconds"] / tenth["seconds"], 2),
        "pandas_ratio": round(by_pandas["seconds"] / tenth["seconds"], 2),
        "identical": by_pandas["identical"],
        "growth_cpu": round(built["whole"]["cpu_seconds"] / tenth["cpu_seconds"], 2),
        "pandas_ratio_cpu": round(by_pandas["cpu_seconds"] / tenth["cpu_seconds"], 2),
        "cpu_seconds": round(built["whole"]["cpu_seconds"], 2),
        "rows": rows,
        "samples": built["whole"]["samples"],
        "seconds_tenth": round(tenth["seconds"], 2),
        "seconds_pandas_tenth": round(by_pandas["seconds"], 2),
        "seconds_skewed": round(built["skewed"]["seconds"], 2),
        "peak_gb_even": round(built["whole"]["peak_gb"], 3),
        "peak_gb_skewed": round(built["skewed"]["peak_gb"], 3),
        "duckdb": duckdb.__version__,
        "device": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def make_log(folder: Path, rows: int, users: int, items: int = 50_000) -> None:
    """A log of exactly ``rows`` rows as Parquet files under ``folder`` (see rebuild_log.sql)."""
    day = folder / "landed_on=2026-04-01"
    day.parent.mkdir(parents=True)
    values = {"users": users, "slates": rows // 28, "items": items, "rows": rows, "folder": day}
    text = (Path(__file__).parent / "rebuild_log.sql").read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"${name}", str(value))
    config = {
        "memory_limit": "2.5GB",
        "temp_directory": str(folder / "spill"),
        "preserve_insertion_order": "false",
    }
    with duckdb.connect(config=config) as con:
        con.execute("set TimeZone = 'UTC'")
        con.execute(text)


def snapshot_of(folder: Path) -> LogSnapshot:
    """The made log as a snapshot."""
    files = sorted(str(path) for path in folder.glob("landed_on=*/*.parquet"))
    return LogSnapshot(version=0, files=files, watermark=WATERMARK, schema=LOG_SCHEMA)


def child(what: str, folder: Path) -> dict:  # type: ignore[type-arg]
    """Run one measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def build(folder: Path) -> dict:  # type: ignore[type-arg]
    """Build both stages with the product."""
    shutil.rmtree(folder / "datasets", ignore_errors=True)
    started = clocks()
    dataset = PreferenceDataset.build(snapshot_of(folder), SETTINGS, folder / "datasets")
    counts = {stage: counts.samples for stage, counts in dataset.manifest.stages.items()}
    return {**since(started), "peak_gb": peak_gb(), "samples": counts}


def build_with_pandas(folder: Path) -> dict:  # type: ignore[type-arg]
    """Make the rows of both stages with pandas, and compare them with what the product built."""
    from rebuild_pandas import samples

    started = clocks()
    rows = samples(snapshot_of(folder).files, SETTINGS, WATERMARK)
    taken = {**since(started), "peak_gb": peak_gb()}
    (path,) = (folder / "datasets").iterdir()
    dataset = PreferenceDataset.open(path)
    identical = all(_comparable(found) == _stored(dataset, stage) for stage, found in rows.items())  # type: ignore[arg-type]
    return {**taken, "identical": identical}


def _comparable(rows: list[tuple]) -> list[tuple]:  # type: ignore[type-arg]
    """pandas writes nothing as None or NaN, whichever the column prefers."""
    return [
        (
            *row[:4],
            row[4].to_pydatetime(),
            *(None if fact is None or fact != fact else fact for fact in row[5:]),
        )
        for row in rows
    ]


def _stored(dataset: PreferenceDataset, stage: str) -> list[tuple]:  # type: ignore[type-arg]
    names = [
        "user_id",
        "history",
        "chosen",
        "rejected",
        "asked_at",
        "request_id",
        "policy_version",
        "propensity",
    ]
    table = dataset.stage(stage).select(names)  # type: ignore[arg-type]
    return list(zip(*(table.column(name).to_pylist() for name in names), strict=True))


CHILDREN = {"build": build, "pandas": build_with_pandas}

if __name__ == "__main__":
    sys.exit(main())
