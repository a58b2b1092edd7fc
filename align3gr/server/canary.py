"""Watches how a canary answers: one that fails or is slow is refused after a few answers, not after a day.

What users think of its items is the scheduler's to judge, from the log; this is what only the server sees.
Both lanes share a machine that may be busy with other work, so an answer of the canary is only ever compared
with what the reference took at the same time. Used from the event loop; nothing is stored: a server that
starts again sees the next answers.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Literal

from .metrics import ServerMetrics

if TYPE_CHECKING:
    from policies.ledger import Canary
    from policies.settings import CanarySettings

Outcome = Literal["failed", "late"]

_REMEMBERED = 500
"""Answers of the reference that are kept: those during the canary's deadline, at some 250 a second."""
_LATEST = 20
"""Answers of the reference that stand in where none was under way during the canary's."""


class CanaryWatch:
    """Told of every answer; calls ``refuse`` once the canary answers worse than the settings allow."""

    def __init__(
        self,
        settings: "CanarySettings",
        refuse: "Callable[[Canary, str], None]",
        metrics: ServerMetrics,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings, self._refuse, self._metrics, self._clock = settings, refuse, metrics, clock
        self._reference: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._begin(None)

    def reference_answered(self, seconds: float) -> None:
        """The reference has just answered, in ``seconds`` of its own."""
        self._reference.append((self._clock(), seconds))

    def answered(self, canary: "Canary", seconds: float) -> None:
        """The canary has just answered."""
        self._metrics.canary_answers.labels("answered").inc()
        self._of(canary)
        self._troubles.append(None)
        settings, theirs = self._settings, self._meanwhile(seconds)
        if settings.latency_factor is None or theirs is None:
            return
        slow = seconds > max(settings.latency_factor * theirs, settings.latency_floor_s)
        self._took(canary, (seconds, theirs) if slow else None)

    def failed(self, canary: "Canary", outcome: Outcome, seconds: float, cause: str) -> None:
        """The canary failed or was late; the reference has just answered, ``seconds`` after the request.

        A late answer says nothing against the canary where the reference was about as slow at the same time.
        """
        self._metrics.canary_answers.labels(outcome).inc()
        self._of(canary)
        settings = self._settings
        if outcome == "late":
            theirs = self._meanwhile(seconds)
            if theirs is not None and seconds <= (settings.latency_factor or 1.0) * theirs:
                return
            self._took(canary, (seconds, theirs or 0.0))
        self._troubles.append((outcome, cause))
        lately = list(self._troubles)[-settings.latency_answers :]
        failures = [one for one in self._troubles if one is not None and one[0] == "failed"]
        late = [one for one in lately if one is not None and one[0] == "late"]
        if len(failures) >= settings.failures or len(late) >= settings.late:
            self._refuse(
                canary,
                f"{len(failures)} of its last {len(self._troubles)} answers failed, "
                f"{len(late)} of the last {len(lately)} were late: {cause}",
            )

    def _took(self, canary: "Canary", slow: tuple[float, float] | None) -> None:
        """What the canary and the reference took, where that was slow."""
        self._slow.append(slow)
        found = [one for one in self._slow if one is not None]
        if len(found) >= self._settings.latency_slow:
            ours, theirs = (median(times) for times in zip(*found, strict=True))
            self._refuse(
                canary,
                f"{len(found)} of its last {len(self._slow)} answers were slow: {ours * 1000:.0f} ms, the "
                f"reference {theirs * 1000:.0f} ms at the same time (medians)",
            )

    def _meanwhile(self, seconds: float) -> float | None:
        """What the reference took (median) while the canary took the last ``seconds``: of its answers that
        were under way then, else of its latest; None where it has given none.
        """
        since = self._clock() - seconds
        times = [took for ended, took in self._reference if ended >= since]
        times = times or [took for _, took in list(self._reference)[-_LATEST:]]
        return median(times) if times else None

    def _of(self, canary: "Canary") -> None:
        if self._seq != canary.seq:
            self._begin(canary.seq)

    def _begin(self, seq: int | None) -> None:
        self._seq = seq
        self._slow: deque[tuple[float, float] | None] = deque(maxlen=self._settings.latency_answers)
        self._troubles: deque[tuple[Outcome, str] | None] = deque(maxlen=self._settings.window)
