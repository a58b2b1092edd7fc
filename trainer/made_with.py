"""What a round's numbers depend on beside its inputs: libraries and the kind of CPU, by version."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("align3gr", "torch", "transformers", "peft", "numpy", "duckdb", "pyarrow")


def made_with() -> dict[str, str]:
    """Name -> version, of this process."""
    found = {"python": platform.python_version(), "cpu": _cpu()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    """The processor's name as Linux tells it; elsewhere, or where it tells none, the architecture."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
