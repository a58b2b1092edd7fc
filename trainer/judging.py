"""What the gate is given: candidate, parent and anchor measured on the gate users' cases, kept as a file.

The file is all that the decision depends on, so a decision can be taken again and explained later.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from features.cases import evaluation_cases
from features.catalogue import Catalogue
from features.log import LogSnapshot
from features.sampled_slates import sampled_slates
from policies.gate import GateInput, OffPolicyFigures, PolicyFigures
from policies.gate.own import own_checks
from policies.gate.record import input_as_dict, input_of
from policies.policy import Policy

from .cases import RankingCase, cases_of, context_of, list_cases
from .gate_figures import Measure, gate_figures
from .metrics import POPULAR_SHARE
from .off_policy import gate_evidence, off_policy_report, sampled_cases
from .round_state import RoundState, write_json
from .slicing import item_slices, user_slices
from .workplace import Workplace

TURNS, BATCH = 9, 16
"""Latency: how often each policy answers one batch, and of how many users."""


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
    snapshot, settings = workplace.log().snapshot(state.log_version), workplace.policies.gate
    cases = evaluation_cases(
        snapshot, workplace.features, gate_share=settings.share, stop_share=stop_share, since=since
    )
    slates, ranking = cases_of(cases.slates, cases.ranking)
    users = sorted({case.user_id for case in slates} | {case.user_id for case in ranking})
    anchor = workplace.ledger.anchor()
    parent = workplace.registry.path(state.parent)
    directories = {"candidate": candidate, "reference": parent}
    if anchor is not None and anchor != state.parent:
        directories["anchor"] = workplace.registry.path(anchor)
    popularity = _popularity(parent)
    parts = item_slices(
        popularity,
        eligible,
        Catalogue.open(workplace.home / "catalogue", create=False).first_loaded(),
        now=snapshot.watermark,
        settings=settings,
    )
    asked = list_cases(slates, ranking, users)
    figures: dict[str, PolicyFigures] = {}
    policies: dict[str, Policy] = {}
    for done, (role, directory) in enumerate(directories.items()):
        _tell(workplace, done, len(directories))
        policies[role] = Policy.load(
            directory,
            device=workplace.ranks.place(state.device),
            policies=workplace.registry.directory,
            share_base_with=policies.get("candidate"),
        )
        figures[role] = gate_figures(
            policies[role],
            slates,
            ranking,
            users,
            eligible=eligible,
            popular=_most_popular(popularity, eligible),
            parts=parts,
            measures=_own_measures(settings.checks),
        )
    times = _in_turns(policies["candidate"], policies["reference"], asked[:BATCH], eligible)
    _tell(workplace, len(directories), len(directories))
    given = GateInput(
        tuple(users),
        replace(figures["candidate"], latency_ms=times[0]),
        replace(figures["reference"], latency_ms=times[1]),
        figures.get("anchor"),
        user_slices=user_slices([len(case.history) for case in asked], settings),
        off_policy=_off_policy(
            workplace, snapshot, policies, since=since, stop_share=stop_share, eligible=eligible
        ),
    )
    write_gate_input(out, given)
    means = {role: _means(one) for role, one in figures.items()}
    return {**means, "users": len(users), "anchor_version": anchor}


def write_gate_input(path: Path, given: GateInput) -> None:
    """Store the gate's input; a user without a case of a metric becomes null."""
    write_json(path, input_as_dict(given))


def read_gate_input(path: Path) -> GateInput:
    """The gate's input as it was written, to the last bit."""
    return input_of(json.loads(path.read_text(encoding="utf-8")))


def _in_turns(
    candidate: Policy, reference: Policy, asked: Sequence[RankingCase], eligible: Collection[str]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Milliseconds of one batch by each, the reference first in every turn; a first turn is not counted.

    On a CPU its time is counted, not the clock's: what else the machine does is no fault of the candidate.
    """
    if not asked:
        return (), ()
    users, took = [context_of(case) for case in asked], []
    sides = [(policy, policy.eligible(eligible)) for policy in (reference, candidate)]
    clock = time.process_time if candidate.device.type == "cpu" else time.perf_counter
    for _ in range(TURNS + 1):
        for policy, allowed in sides:
            began = clock()
            policy.recommend(users, 10, eligible=allowed)
            took.append((clock() - began) * 1000)
    return tuple(took[3::2]), tuple(took[2::2])


def _off_policy(
    workplace: Workplace,
    snapshot: LogSnapshot,
    policies: Mapping[str, Policy],
    *,
    since: datetime | None,
    stop_share: float,
    eligible: Collection[str],
) -> OffPolicyFigures | None:
    """What the gate users' sampled slates say of the candidate against the reference."""
    settings = workplace.policies.gate
    if settings.off_policy_min_effective is None:
        return None
    table = sampled_slates(
        snapshot,
        workplace.features,
        gate_share=settings.share,
        stop_share=stop_share,
        role="gate",
        since=since,
        most=settings.off_policy_slates,
    )
    if table.num_rows < settings.off_policy_min_effective:  # fewer slates cannot be worth as many
        return None
    compared = [policies["candidate"], policies["reference"]]
    return gate_evidence(off_policy_report(compared, sampled_cases(table), eligible=eligible))


def _own_measures(names: Sequence[str]) -> dict[str, Measure]:
    """What own checks want to have measured."""
    found = {
        name: getattr(check, "measure", None) for name, check in zip(names, own_checks(names), strict=True)
    }
    return {name: measure for name, measure in found.items() if callable(measure)}


def _tell(workplace: Workplace, done: int, total: int) -> None:
    if workplace.observe is not None:
        workplace.observe("evaluate", done, total)


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


def _popularity(directory: Path) -> list[str]:
    """Item ids, most liked first, as a policy knows them."""
    named: list[str] = json.loads((directory / "popularity.json").read_text(encoding="utf-8"))
    return named


def _most_popular(popularity: Sequence[str], eligible: Collection[str]) -> list[str]:
    """The eligible items among the most popular 1% (one at least)."""
    allowed = set(eligible)
    count = max(1, round(POPULAR_SHARE * len(allowed)))
    return [item for item in popularity if item in allowed][:count]
