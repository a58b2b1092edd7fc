"""What every benchmark asks of its own process: clocks, memory, commit, command; and how a result is kept."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT_AT = ("--keep", "--out", "--plot")
"""Options that name a place of this machine and change no figure."""


def clocks() -> tuple[float, float]:
    """Wall clock and processor time of this process, in seconds."""
    return time.perf_counter(), time.process_time()


def since(started: tuple[float, float]) -> dict[str, float]:
    """Seconds of both clocks since ``started``."""
    wall, processor = clocks()
    return {"seconds": wall - started[0], "cpu_seconds": processor - started[1]}


def peak_mb() -> float:
    """Most that this process has held so far, MiB.

    Linux' own high-water mark of this program; ``ru_maxrss`` would start at the parent's.
    """
    if Path("/proc/self/status").exists():
        return memory_mb("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def peak_gb() -> float:
    """Most that this process has held so far, GB."""
    return peak_mb() * 2**20 / 1e9


def memory_mb(line: str) -> float:
    """A line of Linux' /proc/self/status, such as VmRSS, MiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(found.split()[1]) / 1024 for found in status.splitlines() if found.startswith(line))


def commit() -> str:
    """The commit that is checked out, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return (found.strip() or "unknown") + (" and changes" if changed else "")


def command(words: Sequence[str] | None = None) -> str:
    """The command line (``words``: its arguments) without this machine's folders: of a folder its name, of
    where something is kept nothing."""
    threads = os.environ.get("OMP_NUM_THREADS")
    said = [f"OMP_NUM_THREADS={threads}"] if threads else []
    said += ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    given = list(sys.argv[1:] if words is None else words)
    while given:
        word = given.pop(0)
        if word in KEPT_AT:
            given[:1] = []
        else:
            said.append(f"{Path(word).name}/" if Path(word).is_dir() else word)
    return " ".join(said)


def circumstances(words: Sequence[str] | None = None) -> dict[str, str]:
    """Command (``words``: its arguments), commit, device and date of a result."""
    return {"command": command(words), **origin()}


def origin() -> dict[str, str]:
    """Commit, device and date of a result."""
    return {
        "commit": commit(),
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def record(out: Path, key: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Put one part into the file of results; the part as it stands there."""
    held = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    held[key] = facts
    out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return facts
