"""Whether a canary grows, becomes the reference, or is withdrawn.

One idea: what users made of it is compared by an interval (``betting``) that may be looked at at any time.
The decision is pure and the state of a canary is the ledger, so nothing is lost with a process.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .betting import Blocks
from .ledger import Canary
from .sequential import Floats
from .settings import CanarySettings


@dataclass(frozen=True)
class Compared:
    """What users made of canary and reference, in the order in which they became known."""

    liked: Floats
    """A number in 0 .. 1 each."""
    by_canary: NDArray[np.bool_]
    """Which of the two served them."""


@dataclass(frozen=True)
class CanaryDecision:
    """What one look came to. ``low`` and ``high``: canary less reference, as shares of the latter's mean."""

    action: Literal["wait", "grow", "promote", "withdraw"]
    share: float
    """Of users, after it."""
    why: str
    users: int
    """Of the canary that have been compared."""
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def judge(canary: Canary, compared: Compared, settings: CanarySettings, now: datetime) -> CanaryDecision:
    """What becomes of ``canary``: a pure function, so that a look that was killed is simply made again.

    It is withdrawn when a loss is established (the interval lies below zero), grows when the loss that is not
    excluded, times the share it would fall on, is below ``margin``, and is withdrawn when ``patience_s`` has
    passed with neither.
    """
    here = (now - canary.step_at).total_seconds()
    users = int(min(compared.by_canary.sum(), (~compared.by_canary).sum()))
    if users < settings.min_users:
        why = f"{users} users can be compared, {settings.min_users} are needed"
        return _waited(settings, here, CanaryDecision("wait", canary.share, why, users))
    base = float(np.mean(compared.liked[~compared.by_canary]))
    if base <= 0.0:
        why = "nobody likes what the reference shows: there is nothing to lose by"
        return _waited(settings, here, CanaryDecision("wait", canary.share, why, users))
    interval = Blocks.of(compared.liked, compared.by_canary).interval(1 - settings.confidence)
    low, high = interval[0] / base, interval[1] / base
    figures = f"{low:+.1%} to {high:+.1%} liked against the reference, of {users} users"
    if high < 0.0:
        return CanaryDecision("withdraw", 0.0, f"worse: {figures}", users, low, high)
    share = settings.step_after(canary.share)
    if -low * share >= settings.margin:
        why = f"a loss above {settings.margin / share:.1%} is not excluded: {figures}"
        return _waited(settings, here, CanaryDecision("wait", canary.share, why, users, low, high))
    if here < settings.step_s:
        why = f"{here:.0f} s at this share, {settings.step_s:.0f} s are needed: {figures}"
        return CanaryDecision("wait", canary.share, why, users, low, high)
    action: Literal["promote", "grow"] = "promote" if share == 1.0 else "grow"
    return CanaryDecision(action, share, f"no worse: {figures}", users, low, high)


def _waited(settings: CanarySettings, here: float, decision: CanaryDecision) -> CanaryDecision:
    """``decision``, unless patience has run out."""
    if settings.patience_s is None or here < settings.patience_s:
        return decision
    why = f"nothing was established in {here / 86400:.1f} days: {decision.why}"
    return CanaryDecision("withdraw", 0.0, why, decision.users, decision.low, decision.high)
