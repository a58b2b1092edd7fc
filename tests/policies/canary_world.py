"""Canaries with known truth: users who come back, like by their own taste, and meet whom their hash says."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import numpy as np

from policies.canary import Compared, judge
from policies.ledger import Canary
from policies.settings import CanarySettings

START = datetime(2026, 1, 1, tzinfo=UTC)
LIKED = 0.3
"""Of the items that the reference shows."""


@dataclass(frozen=True)
class Course:
    """How a canary ended, and who had met it by then."""

    action: str
    met: float
    """Share of all users whom the canary served."""
    steps: int


def course(
    effect: float,
    *,
    seed: int,
    users: int = 5000,
    settings: CanarySettings | None = None,
    visits: int = 100,
    looks: int = 400,
) -> Course:
    """One canary that is ``effect`` (-0.1: 10% worse) against the reference, looked at after each ``visits``.

    Every user has a taste of his own (beta with mean LIKED), comes back as often as others, is judged by
    ``settings.judged`` items of the first slate that either policy shows him.
    """
    settings = settings or CanarySettings(step_s=0)
    draw = np.random.default_rng(seed)
    taste = draw.beta(LIKED * 10, (1 - LIKED) * 10, users)
    place = draw.random(users)
    canary = Canary("v2", settings.steps[0], START, START, 2)
    met = {side: np.zeros(users, dtype=bool) for side in (True, False)}
    values = {side: np.empty(0) for side in (True, False)}
    steps = 0
    for look in range(looks):
        visitors = np.unique(draw.integers(0, users, visits))
        for side, factor in ((True, 1 + effect), (False, 1.0)):
            came = visitors[(place[visitors] < canary.share) == side]
            new = draw.permutation(came[~met[side][came]])
            met[side][new] = True
            liked = draw.binomial(settings.judged, np.minimum(1.0, taste[new] * factor)) / settings.judged
            values[side] = np.append(values[side], liked)
        now = START + timedelta(hours=look + 1)
        compared = Compared(values[True], values[False])
        decision = judge(canary, compared, settings, now)
        if decision.action in ("withdraw", "promote"):
            return Course(decision.action, float(met[True].mean()), steps)
        if decision.action == "grow":
            steps += 1
            canary = replace(canary, share=decision.share, step_at=now)
    return Course("wait", float(met[True].mean()), steps)
