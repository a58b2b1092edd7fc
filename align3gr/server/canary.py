"""Watches how a canary answers: one that fails or is slow is refused after a few answers, not after a day.

What users think of its items is the scheduler's to judge, from the log; this is what only the server sees.
Used from the event loop; nothing is stored: a server that starts again sees the next answers.
"""

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Literal

from .metrics import ServerMetrics

if TYPE_CHECKING:
    from policies.ledger import Canary
    from policies.settings import CanarySettings


class CanaryWatch:
    """Told of every answer; calls ``refuse`` once the canary answers worse than the settings allow."""

    def __init__(
        self, settings: "CanarySettings", refuse: "Callable[[Canary, str], None]", metrics: ServerMetrics
    ) -> None:
        self._settings, self._refuse, self._metrics = settings, refuse, metrics
        self._reference: deque[float] = deque(maxlen=settings.latency_answers)
        self._begin(None)

    def reference_answered(self, seconds: float) -> None:
        """The reference answered a request that the canary had nothing to do with."""
        self._reference.append(seconds)

    def answered(self, canary: "Canary", seconds: float) -> None:
        """The canary answered."""
        self._metrics.canary_answers.labels("answered").inc()
        self._of(canary)
        self._failures.append(None)
        self._seconds.append(seconds)
        settings = self._settings
        needed = settings.latency_answers
        if settings.latency_factor is None or min(len(self._seconds), len(self._reference)) < needed:
            return
        ours, theirs = median(self._seconds), median(self._reference)
        if ours > max(settings.latency_factor * theirs, settings.latency_floor_s):
            self._refuse(
                canary,
                f"it answers in {ours * 1000:.0f} ms, the reference in {theirs * 1000:.0f} ms (medians of "
                f"the last {needed} answers)",
            )

    def failed(self, canary: "Canary", outcome: Literal["failed", "late"], cause: str) -> None:
        """The reference answered in the canary's place.

        A late answer says nothing against the canary while the reference itself is as late.
        """
        self._metrics.canary_answers.labels(outcome).inc()
        self._of(canary)
        if outcome == "late" and self._reference and median(self._reference) > self._settings.deadline_s:
            return
        self._failures.append(cause)
        causes = [one for one in self._failures if one is not None]
        if len(causes) >= self._settings.failures:
            self._refuse(
                canary,
                f"{len(causes)} of its last {len(self._failures)} answers failed or were late: {cause}",
            )

    def _of(self, canary: "Canary") -> None:
        if self._seq != canary.seq:
            self._begin(canary.seq)

    def _begin(self, seq: int | None) -> None:
        self._seq = seq
        self._seconds: deque[float] = deque(maxlen=self._settings.latency_answers)
        self._failures: deque[str | None] = deque(maxlen=self._settings.window)
