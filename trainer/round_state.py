"""The rounds table: one directory a round under ``home/rounds``, its ``state.json`` the record of the done.

One idea: a step is done when the state file says so, and the file is replaced atomically after the step's
output is complete. A killed round is read back as the steps it finished; everything else of it is redone from
the same inputs, which the state pins: log version, parent, settings, seed, threads, device.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from features.errors import BadInput

from .errors import TrainerError

log = logging.getLogger(__name__)

Status = Literal["running", "finished", "failed"]
FORMAT = 1
_STATE = "state.json"
_RECORD = {
    *(_STATE, "gate_input.json", "decision.json", "metrics.jsonl", "run.jsonl", "mlflow.json"),
    "forgotten.json",
}
"""What of a round is never tidied away."""


class UnknownRound(TrainerError, BadInput):  # noqa: N818 - reads as what it is
    """No such round in this home directory, or one whose state cannot be read."""


@dataclass(frozen=True)
class RoundState:
    """A round as its last finished step left it."""

    round_id: str
    number: int
    seed: int
    device: str
    threads: int
    parent: str
    """The ledger's reference at the round's start: what the stages continue from."""
    log_version: int
    feedback: int
    """Log rows with a level at ``log_version``: what the next refresh counts new feedback from."""
    started_at: str
    settings: dict[str, Any]
    """The rooms' settings in force at the start, as JSON: a resume uses these, not the file of the day."""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Finished step -> its facts, in the order they finished."""
    status: Status = "running"
    outcome: str | None = None
    """promoted, held, refused or registered; none while running or when it failed."""
    message: str | None = None
    attempts: int = 0
    """How often a process took the round up."""
    ended_at: str | None = None
    catalogue_revision: int | None = None
    """Of the catalogue at the start: its items may be recommended; None: the newest."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions of what the numbers depend on, and the kind of CPU."""
    format: int = FORMAT


class RoundsTable:
    """All rounds of a home directory. Writers hold the lease; readers need nothing."""

    def __init__(self, directory: Path, *, prefix: str = "r") -> None:
        """``prefix``: what the ids begin with, one letter."""
        self.directory = directory
        self._prefix = prefix

    def path(self, round_id: str) -> Path:
        """The round's directory."""
        return self.directory / round_id

    def create(self, first: Callable[[str, int], RoundState]) -> RoundState:
        """Give a round the next free number: ``first(round_id, number)`` is its first state.

        The directory appears with its state in it or not at all.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name[1:]) for path in self._directories()), default=0)
        for torn in self.directory.glob(".new-*"):
            shutil.rmtree(torn)
        while True:
            number += 1
            numbered = first(f"{self._prefix}{number:04d}", number)
            staging = Path(tempfile.mkdtemp(prefix=".new-", dir=self.directory))
            write_json(staging / _STATE, asdict(numbered))
            try:
                staging.rename(self.path(numbered.round_id))
            except OSError:
                shutil.rmtree(staging)
                if not self.path(numbered.round_id).exists():
                    raise
            else:
                return numbered

    def write(self, state: RoundState) -> RoundState:
        """Replace the round's state atomically; returns it."""
        write_json(self.path(state.round_id) / _STATE, asdict(state))
        return state

    def finish_step(self, state: RoundState, step: str, facts: dict[str, Any]) -> RoundState:
        """Record that ``step`` is complete, with its facts."""
        return self.write(replace(state, steps={**state.steps, step: facts}))

    def read(self, round_id: str) -> RoundState:
        """The round's state. Raises UnknownRound."""
        path = self.path(round_id) / _STATE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']} is not {FORMAT}")
            return RoundState(**raw)
        except FileNotFoundError as error:
            known = ", ".join(sorted(path.name for path in self._directories())[-5:]) or "none yet"
            raise UnknownRound(f"there is no round {round_id}; the last ones are: {known}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            cause = " ".join(str(error).split())
            raise UnknownRound(f"round {round_id} cannot be read ({cause}): start a new round") from error

    def all(self) -> list[RoundState]:
        """Every readable round, oldest first; others are named in the log."""
        rounds: list[RoundState] = []
        for path in self._directories():
            try:
                rounds.append(self.read(path.name))
            except UnknownRound as error:
                log.warning("round unreadable round=%s cause=%s", path.name, error)
        return sorted(rounds, key=lambda state: state.number)

    def last(self) -> RoundState | None:
        """The newest round."""
        rounds = self.all()
        return rounds[-1] if rounds else None

    def tidy(self, keep: int) -> list[str]:
        """Delete the working files of ended rounds, all but the newest ``keep`` (1 or more) of them.

        A round that has not ended may be resumed and keeps everything. Returns the rounds that lost files.
        """
        over = [state.round_id for state in self.all() if state.status != "running"]
        return [round_id for round_id in over[:-keep] if _strip(self.path(round_id))]

    def _directories(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [
            path
            for path in self.directory.iterdir()
            if path.name[:1] == self._prefix and path.name[1:].isdigit()
        ]


def ended(
    state: RoundState, status: Status, at: datetime, *, outcome: str | None, message: str
) -> RoundState:
    """The state of a round that is over."""
    return replace(state, status=status, outcome=outcome, message=message, ended_at=at.isoformat())


def _strip(directory: Path) -> bool:
    """Leave nothing but the round's record in its directory; whether there was more."""
    more = False
    for path in sorted(directory.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name not in _RECORD:
            path.unlink()
            more = True
    return more


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
