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
    looks: int


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
    ``settings.judged`` items of the first slate that either policy shows him. As in ``trainer.canary``, who
    comes to the canary when it grows counts for the reference no more.
    """
    settings = settings or CanarySettings(step_s=0)
    draw = np.random.default_rng(seed)
    taste = draw.beta(LIKED * 10, (1 - LIKED) * 10, users)
    place = draw.random(users)
    canary = Canary("v2", settings.steps[0], START, START, 2)
    met = {side: np.zeros(users, dtype=bool) for side in (True, False)}
    known = np.empty(0, dtype=np.int64)
    liked, by_canary = np.empty(0), np.empty(0, dtype=bool)
    steps = 0
    for look in range(looks):
        visitors = draw.permutation(np.unique(draw.integers(0, users, visits)))
        served = place[visitors] < canary.share
        new = ~np.where(served, met[True][visitors], met[False][visitors])
        came, side = visitors[new], served[new]
        met[True][came[side]] = True
        met[False][came[~side]] = True
        chance = np.minimum(1.0, taste[came] * np.where(side, 1 + effect, 1.0))
        known, by_canary = np.append(known, came), np.append(by_canary, side)
        liked = np.append(liked, draw.binomial(settings.judged, chance) / settings.judged)
        counts = by_canary == (place[known] < canary.share)
        now = START + timedelta(hours=look + 1)
        decision = judge(canary, Compared(liked[counts], by_canary[counts]), settings, now)
        share = float(met[True].mean())
        if decision.action in ("withdraw", "promote"):
            return Course(decision.action, share, steps, look + 1)
        if decision.action == "grow":
            steps += 1
            canary = replace(canary, share=decision.share, step_at=now)
    return Course("wait", float(met[True].mean()), steps, looks)
