"""One look at the canary: what its users made of it, from the log, and the move in the ledger that follows.

One idea: nothing is kept between looks. The ledger says who is the canary and since when, the log says what
users did, the decision is a pure function of both, and the move is compare-and-set: a look that was killed,
or that two schedulers take at once, changes nothing that another does not find.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from features.judged_versions import judged_versions
from features.log import LogMissing
from policies.canary import CanaryDecision, Compared, judge
from policies.ledger import Canary, LedgerConflict
from policies.settings import CanarySettings
from policies.shares import takes_part

from .workplace import Workplace

log = logging.getLogger(__name__)

WHO = "canary"
"""Who grows, promotes and withdraws, in the ledger."""


@dataclass(frozen=True)
class CanaryLook:
    """The canary, as it stood before the look, and what the look came to."""

    version: str
    reference: str
    share: float
    decision: CanaryDecision

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def look(workplace: Workplace) -> CanaryLook | None:
    """What a look at the canary says now; changes nothing. None where there is no canary."""
    canary, reference = workplace.ledger.canary(), workplace.ledger.reference()
    if canary is None or reference is None:
        return None
    settings = workplace.policies.promotion.canary or CanarySettings()
    compared = compared_users(workplace, canary, reference, settings)
    return CanaryLook(
        canary.version, reference, canary.share, judge(canary, compared, settings, workplace.clock())
    )


def follow(workplace: Workplace) -> CanaryLook | None:
    """Look at the canary and move the ledger accordingly. None where there is no canary."""
    canary = workplace.ledger.canary()
    found = look(workplace)
    if canary is None or found is None or found.version != canary.version:
        return found
    ledger, decision = workplace.ledger, found.decision
    try:
        if decision.action == "grow":
            ledger.grow_canary(canary, decision.share, who=WHO, why=decision.why)
        elif decision.action == "promote":
            ledger.promote(canary.version, expects=found.reference, who=WHO, why=decision.why)
        elif decision.action == "withdraw":
            ledger.withdraw(canary.version, who=WHO, why=decision.why)
    except LedgerConflict as conflict:
        log.info("canary=%s moved_by_another cause=%s", canary.version, conflict)
    log.info("canary=%s action=%s why=%s", canary.version, decision.action, decision.why)
    return found


def compared_users(
    workplace: Workplace, canary: Canary, reference: str, settings: CanarySettings
) -> Compared:
    """The users of each, in the order in which they became known.

    One who changed sides when the canary grew counts for the canary only: by hash, whatever they made of it.
    """
    try:
        snapshot = workplace.log().snapshot()
    except LogMissing:
        return Compared(np.empty(0), np.empty(0, dtype=np.bool_))
    table = judged_versions(
        snapshot,
        workplace.features,
        (canary.version, reference),
        since=canary.began_at,
        judged=settings.judged,
    )
    users, by_canary = table["user_id"].to_pylist(), pc.equal(table["version"], canary.version)
    sides = by_canary.to_numpy()
    counted = np.array([takes_part(user, canary) for user in users], dtype=np.bool_) == sides
    return Compared(table["liked"].to_numpy()[counted], sides[counted])
