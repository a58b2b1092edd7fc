"""What a round's numbers depend on beside its inputs: libraries and the kind of CPU, by version."""

import platform
from importlib.metadata import PackageNotFoundError, version

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
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - no file of ours
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
