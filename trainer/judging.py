"""What the gate is given: candidate, parent and anchor measured on the gate users' cases, kept as a file.

The file is all that the decision depends on, so a decision can be taken again and explained later.
"""

import json
from collections.abc import Collection
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from features.cases import evaluation_cases
from policies.gate import GateInput, PolicyFigures
from policies.policy import Policy

from .evaluation import POPULAR_SHARE, cases_of, gate_figures
from .round_state import RoundState, write_json
from .workplace import Workplace


def measure(
    workplace: Workplace,
    state: RoundState,
    *,
    candidate: Path,
    since: datetime | None,
    stop_share: float,
    eligible: list[str],
    out: Path,
) -> dict[str, Any]:
    """Measure the policies, write ``out``, and give the means of each for the round's state.

    ``since``: only cases that arrived later. The anchor is left out where it is the parent itself.
    """
    cases = evaluation_cases(
        workplace.log().snapshot(state.log_version),
        workplace.features,
        gate_share=workplace.policies.gate.share,
        stop_share=stop_share,
        since=since,
    )
    slates, ranking = cases_of(cases.slates, cases.ranking)
    users = sorted({case.user_id for case in slates} | {case.user_id for case in ranking})
    anchor = workplace.ledger.anchor()
    parent = workplace.registry.path(state.parent)
    directories = {"candidate": candidate, "reference": parent}
    if anchor is not None and anchor != state.parent:
        directories["anchor"] = workplace.registry.path(anchor)
    popular = _most_popular(parent, eligible)
    figures: dict[str, PolicyFigures] = {}
    base: Policy | None = None
    for done, (role, directory) in enumerate(directories.items()):
        _tell(workplace, done, len(directories))
        policy = Policy.load(
            directory,
            device=workplace.ranks.place(state.device),
            policies=workplace.registry.directory,
            share_base_with=base,
        )
        base = base or policy
        figures[role] = gate_figures(policy, slates, ranking, users, eligible=eligible, popular=popular)
    _tell(workplace, len(directories), len(directories))
    given = GateInput(tuple(users), figures["candidate"], figures["reference"], figures.get("anchor"))
    write_gate_input(out, given)
    means = {role: _means(one) for role, one in figures.items()}
    return {**means, "users": len(users), "anchor_version": anchor}


def write_gate_input(path: Path, given: GateInput) -> None:
    """Store the gate's input; a user without a case of a metric becomes null."""
    write_json(path, _plain(asdict(given)))


def read_gate_input(path: Path) -> GateInput:
    """The gate's input as it was written, to the last bit."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    anchor = raw["anchor"]
    return GateInput(
        users=tuple(raw["users"]),
        candidate=_read_figures(raw["candidate"]),
        reference=_read_figures(raw["reference"]),
        anchor=_read_figures(anchor) if anchor is not None else None,
    )


def _tell(workplace: Workplace, done: int, total: int) -> None:
    if workplace.observe is not None:
        workplace.observe("evaluate", done, total)


def _read_figures(raw: dict[str, Any]) -> PolicyFigures:
    per_user = {name: np.array(values, dtype=np.float64) for name, values in raw.pop("per_user").items()}
    return PolicyFigures(per_user=per_user, **raw)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [None if np.isnan(one) else float(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value


def _means(figures: PolicyFigures) -> dict[str, float]:
    """Means over the users that have a case; a metric that nobody has is left out."""
    means = {
        name: float(np.nanmean(values))
        for name, values in figures.per_user.items()
        if not np.isnan(values).all()
    }
    means |= {"coverage": figures.coverage, "validity": figures.validity}
    if figures.concentration is not None:
        means["concentration"] = figures.concentration
    return means


def _most_popular(directory: Path, eligible: Collection[str]) -> list[str]:
    """The eligible items that a policy knows as the most popular 1% (one at least)."""
    allowed = set(eligible)
    named = json.loads((directory / "popularity.json").read_text(encoding="utf-8"))
    count = max(1, round(POPULAR_SHARE * len(allowed)))
    return [item for item in named if item in allowed][:count]
