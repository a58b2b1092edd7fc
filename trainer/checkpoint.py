"""State of an interrupted training: written beside, then swapped in; a kill leaves the old or the new.

A checkpoint names the run it belongs to by a key over all that determines it; another run never continues it.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    facts: Mapping[str, Any]
    """Plain values: where the training stands."""
    states: Mapping[str, Any]
    """State dictionaries of model, optimizer and the like, by name."""


class Checkpoint:
    """One training's state in ``directory`` (none: nothing is kept); ``key`` names the training."""

    def __init__(self, directory: Path | None, key: str) -> None:
        self.directory = directory
        self.key = key

    def save(self, facts: Mapping[str, Any], states: Mapping[str, Any]) -> None:
        """Replace what was saved before. Tensors and plain values only: nothing is unpickled later."""
        if self.directory is None:
            return
        staging, old = self._beside("new"), self._beside("old")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with (staging / "state.pt").open("wb") as file:  # given a name, torch hides what the disk said
            torch.save(dict(states), file)
        (staging / "state.json").write_text(json.dumps({"run": self.key, **facts}), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if self.directory.exists():
            self.directory.rename(old)
        staging.rename(self.directory)
        shutil.rmtree(old, ignore_errors=True)

    def load(self, device: str | torch.device = "cpu") -> Saved | None:
        """What was saved last under this key; none when there is nothing, or another training's."""
        if self.directory is None:
            return None
        old = self._beside("old")
        if not self.directory.exists() and old.exists():
            old.rename(self.directory)  # killed between the two renames of save
        if not (self.directory / "state.json").is_file():
            return None
        facts = json.loads((self.directory / "state.json").read_text(encoding="utf-8"))
        if facts.pop("run") != self.key:
            log.warning("checkpoint=%s belongs_to_another_run=true action=start_over", self.directory)
            return None
        states = torch.load(self.directory / "state.pt", map_location=device, weights_only=True)
        return Saved(facts, states)

    def clear(self) -> None:
        """Remove it: the training it belongs to has ended."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _beside(self, suffix: str) -> Path:
        assert self.directory is not None
        return self.directory.with_name(f"{self.directory.name}.{suffix}")
