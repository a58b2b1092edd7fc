"""What every benchmark asks of its own process: its clocks, its memory, and the commit it measures."""

import resource
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
