"""Guards at work in a chain of stages: every stage is held against the one before it and the chain's start.

Each policy is measured once and its figures kept on disk, so a chain that was killed measures nothing again.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.policy import Policy

from .cases import RankingCase
from .preference.guards import GuardFigures, broken, measure_guards
from .round_state import write_json
from .settings import GuardSettings

STAGED = "policy"
"""Name of the directory in a stage's own that holds what it ended with."""


@dataclass(frozen=True)
class StageGuards:
    """The guards of one chain that starts from the policy in ``start``."""

    directory: Path
    """Keeps the figures."""
    start: Path
    bounds: GuardSettings
    load: Callable[[Path], Policy]
    observe: Callable[[str, int, int], None]
    """Told (what, done, in all)."""
    eligible: Collection[str] | None = None
    """Items that may be recommended; none: all."""
    popularity: Sequence[str] | None = None
    """Items, most popular first, to judge all policies by; none: each policy's own."""

    def judge(
        self, stage: str, before: Path, after: Path, kind: str, cases: Sequence[RankingCase]
    ) -> dict[str, Any]:
        """Figures of the policies around ``stage`` on ``cases``, and the bounds that it broke, in sentences.

        ``kind`` names the cases. Too few users judge nothing, which is said.
        """
        if not cases:
            why = f"fewer than {self.bounds.min_users} users have a held-out case"
            return {"cases": kind, "broken": [], "not_judged": why}
        figures = {
            role: self._figures(kind, path, cases, stage)
            for role, path in (("start", self.start), ("before", before), ("after", after))
        }
        found = broken(figures["before"], figures["after"], self.bounds)
        if before != self.start and not found:
            since = broken(figures["start"], figures["after"], self.bounds)
            found = [f"since the start of the chain, {sentence}" for sentence in since]
        return {"cases": kind, **{role: one.as_dict() for role, one in figures.items()}, "broken": found}

    def _figures(self, kind: str, policy: Path, cases: Sequence[RankingCase], stage: str) -> GuardFigures:
        """Measured once for each policy and kind of cases."""
        name = f"after {policy.parent.name}" if policy.name == STAGED else policy.name
        file = self.directory / f"{kind}, {name}.json"
        if file.is_file() and name != f"after {stage}":  # a stage that runs again made another policy
            return GuardFigures.from_dict(json.loads(file.read_text(encoding="utf-8")))
        found = measure_guards(
            self.load(policy),
            cases,
            eligible=self.eligible,
            popularity=self.popularity,
            progress=lambda _, done, total: self.observe(f"{stage}: guard", done, total),
        )
        file.parent.mkdir(exist_ok=True)
        write_json(file, found.as_dict())
        return found
