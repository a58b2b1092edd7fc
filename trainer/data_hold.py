"""Whether a refresh may learn from the data as it is: the last verdict, and what a person has accepted.

One idea: two small files under ``home/quality``. ``last.json`` is what the last look found, for status;
``accepted.json`` is what a person took responsibility for: these breaches, until a period after the data that
they looked at. A breach of another kind, or the same one a period later, holds again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from features.errors import BadInput
from features.log import LogSnapshot
from features.quality import QualityReport, quality_of
from features.settings import FeatureSettings

from .errors import TrainerError
from .round_state import write_json

_LAST, _ACCEPTED = "last.json", "accepted.json"


class DataHeld(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """The data left its bounds and nobody has accepted that."""


class NothingHeld(TrainerError, BadInput):  # noqa: N818
    """There is nothing to accept."""


@dataclass(frozen=True)
class Verdict:
    """What one look came to."""

    report: QualityReport
    held: tuple[str, ...]
    """Why a refresh must wait, a sentence each; empty: it need not."""
    accepted: tuple[str, ...]
    """Breaches that a person has accepted."""


class DataHold:
    """The hold of one home directory."""

    def __init__(self, home: Path, settings: FeatureSettings, clock: Callable[[], datetime]) -> None:
        self.directory, self._settings, self._clock = home / "quality", settings, clock

    def look(self, snapshot: LogSnapshot) -> Verdict:
        """Measure ``snapshot``, keep the verdict for status, and say what holds."""
        return self._judged(quality_of(snapshot, self._settings))

    def require(self, snapshot: LogSnapshot) -> None:
        """Raises DataHeld where a refresh must wait; an empty log is the refresh's own to refuse."""
        if not snapshot.files:
            return
        verdict = self.look(snapshot)
        if verdict.held:
            raise DataHeld(f"the data left its bounds: {'; '.join(verdict.held)}; {WAY_OUT}")

    def accept(self, snapshot: LogSnapshot, *, who: str, why: str) -> Verdict:
        """Take responsibility for what is wrong with ``snapshot``. Raises NothingHeld."""
        report = quality_of(snapshot, self._settings)
        if not report.breaches or report.until is None:
            raise NothingHeld("the data is within its bounds: there is nothing to accept")
        until = report.until + timedelta(seconds=self._settings.quality.period_s)
        self.directory.mkdir(parents=True, exist_ok=True)
        facts = {
            "breaches": [[one.code, one.about] for one in report.breaches],
            "until": until.isoformat(),
            "who": who,
            "why": why,
            "at": self._clock().isoformat(),
        }
        write_json(self.directory / _ACCEPTED, facts)
        return self._judged(report)

    def forget(self, user_id: str) -> None:
        """Remove what names this user; the next look measures anew."""
        named = json.dumps(user_id)[1:-1]
        for name in (_LAST, _ACCEPTED):
            file = self.directory / name
            if file.is_file() and named in file.read_text(encoding="utf-8"):
                file.unlink()

    def last(self) -> dict[str, Any] | None:
        """What the last look found; None where nobody has looked."""
        return self._read(_LAST)

    def _judged(self, report: QualityReport) -> Verdict:
        accepted = self._accepted(report)
        held = [one.words for one in report.breaches if (one.code, one.about) not in accepted]
        taken = [one.words for one in report.breaches if (one.code, one.about) in accepted]
        verdict = Verdict(report, tuple(held) if self._settings.quality.hold else (), tuple(taken))
        self.directory.mkdir(parents=True, exist_ok=True)
        facts = {"at": self._clock().isoformat(), "held": list(verdict.held), "accepted": taken}
        write_json(self.directory / _LAST, {**facts, "report": report.as_dict()})
        return verdict

    def _accepted(self, report: QualityReport) -> set[tuple[str, str]]:
        facts = self._read(_ACCEPTED)
        if facts is None or report.until is None or report.until > datetime.fromisoformat(facts["until"]):
            return set()
        return {(code, about) for code, about in facts["breaches"]}

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.directory / name
        try:
            facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise BadInput(f"{file} cannot be read ({error}); delete it") from error
        return facts


WAY_OUT = "see align3gr quality show; to learn from it all the same: align3gr quality accept --why ..."
