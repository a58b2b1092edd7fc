"""Policies side by side: the same cases, columns and beams for each, with intervals and paired differences.

One row is one policy in one column at one beam. The bootstrap resamples users, the same for every row, so
that the difference of two policies is paired; where they are seeds of one recipe, seeds are resampled too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.policy import Policy, UserContext

from .cases import RankingCase
from .evaluation import Progress, RankingFigures, beam_plan, popularity_baseline, rank_catalogue
from .metrics import COLUMNS, Bootstrap, Interval

DEPTH = 10
"""Places of a list that coverage, concentration and popularity are taken over, whatever the cutoffs are."""


@dataclass(frozen=True)
class Row:
    """One policy, one column, one beam."""

    version: str
    column: str
    """unseen or all_items."""
    figures: RankingFigures
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "policy": self.version,
            "column": self.column,
            **self.figures.as_dict(),
            "intervals": {name: one.as_list() for name, one in self.intervals.items()},
        }


@dataclass(frozen=True)
class Contrast:
    """A policy less the first one, or the mean of all of them, in one column at one beam."""

    names: str
    column: str
    beam: int
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: metric -> [mean, low, high]."""
        figures = {name: [one.mean, *one.as_list()] for name, one in self.intervals.items()}
        return {"of": self.names, "column": self.column, "beam": self.beam, **figures}


@dataclass
class Comparison:
    """Measures policies one at a time, so that one is in memory at a time."""

    cases: Sequence[RankingCase]
    beams: Sequence[int]
    cutoffs: Sequence[int]
    columns: Sequence[str] = COLUMNS
    eligible: Collection[str] | None = None
    seed: int = 0
    rows: list[Row] = field(default_factory=list)
    popularity: dict[str, dict[str, float]] = field(default_factory=dict)
    """Column -> metric -> mean, of the list of what is popular."""

    def __post_init__(self) -> None:
        self._bootstrap = Bootstrap(len({case.user_id for case in self.cases}), seed=self.seed)
        self._order: list[str] | None = None

    def measure(self, policy: Policy, *, progress: Progress | None = None) -> None:
        """Add the rows of ``policy``. What is popular is what the first one holds for popular."""
        if self._order is None:
            everybody = policy.recommend([UserContext("")], len(policy.codec), eligible=self.eligible)[0]
            self._order = [one.item_id for one in everybody]
            for column in self.columns:
                self.popularity[column] = popularity_baseline(
                    self._order, self.cases, cutoffs=self.cutoffs, exclude_seen=column == "unseen"
                )
        for column in self.columns:
            for beam, cutoffs in beam_plan(self.beams, self.cutoffs):
                figures = rank_catalogue(
                    policy,
                    self.cases,
                    cutoffs=cutoffs,
                    beam=beam,
                    eligible=self.eligible,
                    exclude_seen=column == "unseen",
                    popularity=self._order,
                    depth=min(DEPTH, max(cutoffs)),
                    progress=progress,
                )
                intervals = self._bootstrap.intervals(figures.per_user)
                self.rows.append(Row(policy.version, column, figures, intervals))

    def differences(self) -> list[Contrast]:
        """Every later policy less the first, user by user."""
        found = []
        for column, beam, rows in self.groups():
            first = rows[0]
            for row in rows[1:]:
                difference = self._bootstrap.differences(row.figures.per_user, first.figures.per_user)
                found.append(Contrast(f"{row.version} - {first.version}", column, beam, difference))
        return found

    def over_seeds(self) -> list[Contrast]:
        """The mean of the policies, taken as seeds of one recipe; intervals over users and seeds."""
        found = []
        for column, beam, rows in self.groups():
            tables = {
                name: np.stack([row.figures.per_user[name] for row in rows])
                for name in rows[0].figures.per_user
            }
            found.append(
                Contrast(f"mean of {len(rows)} seeds", column, beam, self._bootstrap.intervals(tables))
            )
        return found

    def groups(self) -> list[tuple[str, int, list[Row]]]:
        """(column, beam, its rows in order)."""
        groups: dict[tuple[str, int], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.column, row.figures.beam), []).append(row)
        return [(column, beam, rows) for (column, beam), rows in groups.items()]
