"""What a round notes about itself: parameters, metric curves, artifacts, its end.

One idea: notes are lines of ``run.jsonl`` in the round's own directory, written as they happen; sending
them to MLflow is somebody else's job (policies/mlflow_mirror.py) and may come later. A round that is killed
and resumed goes on in the same file.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

NOTES = "run.jsonl"


def epoch_ms() -> int:
    """Milliseconds since 1970, the unit of MLflow's time stamps."""
    return int(time.time() * 1000)


class RoundRun:
    """``with registry.round_run(round_id) as run: run.metrics({...}, step=3)``."""

    def __init__(self, directory: Path, *, clock_ms: Callable[[], int] = epoch_ms) -> None:
        self.directory = directory
        self._clock_ms = clock_ms

    def __enter__(self) -> "RoundRun":
        self.directory.mkdir(parents=True, exist_ok=True)
        self._note({"started": True})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._note({"status": "FINISHED" if kind is None else "FAILED"})

    def params(self, values: Mapping[str, Any]) -> None:
        """Note parameters; nested mappings become dotted keys."""
        self._note({"params": _flat(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Note one point of each curve."""
        self._note({"metrics": {key: float(value) for key, value in values.items()}, "step": step})

    def artifact(self, path: Path) -> None:
        """Note a file or directory that belongs to the run; it stays where it is."""
        self._note({"artifact": str(path)})

    def _note(self, facts: dict[str, Any]) -> None:
        line = json.dumps({**facts, "at": self._clock_ms()}, default=str)
        with (self.directory / NOTES).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass
class RunNotes:
    """All notes of one round, read back."""

    lines: int = 0
    status: str = "RUNNING"
    started_at: int = 0
    ended_at: int = 0
    params: dict[str, str] = field(default_factory=dict)
    points: list[tuple[str, float, int, int]] = field(default_factory=list)
    """(metric, value, step, epoch milliseconds)."""
    artifacts: list[Path] = field(default_factory=list)


def read_notes(directory: Path) -> RunNotes | None:
    """Notes of the round in ``directory``; None where it has none. A torn last line is left out."""
    path = directory / NOTES
    if not path.exists():
        return None
    notes = RunNotes()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            facts = json.loads(line)
        except ValueError:
            continue  # torn by a kill in the middle of the line; the resumed round writes its own
        notes.lines += 1
        at = int(facts["at"])
        notes.started_at = notes.started_at or at
        notes.ended_at = at
        notes.status = facts.get("status", "RUNNING")
        notes.params.update(facts.get("params", {}))
        for key, value in facts.get("metrics", {}).items():
            notes.points.append((key, float(value), int(facts["step"]), at))
        if "artifact" in facts:
            notes.artifacts.append(Path(facts["artifact"]))
    return notes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = str(value)
    return flat
