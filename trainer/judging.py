"""What the gate is given: candidate, parent and anchor measured on the gate users' cases, kept as a file.

The file is all that the decision depends on, so a decision can be taken again and explained later.
"""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from features.cases import EvaluationCases, evaluation_cases
from policies.gate import Floats, GateInput, PolicyFigures
from policies.policy import Policy

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
    anchor = workplace.ledger.anchor()
    directories = {"candidate": candidate, "reference": workplace.registry.path(state.parent)}
    if anchor is not None and anchor != state.parent:
        directories["anchor"] = workplace.registry.path(anchor)
    figures: dict[str, PolicyFigures] = {}
    users: tuple[str, ...] = ()
    base: Policy | None = None
    for done, (role, directory) in enumerate(directories.items()):
        if workplace.observe is not None:
            workplace.observe("evaluate", done, len(directories))
        policy = Policy.load(
            directory,
            device=workplace.ranks.place(state.device),
            policies=workplace.registry.directory,
            share_base_with=base,
        )
        base = base or policy
        users, figures[role] = _figures(policy, cases, eligible)
    given = GateInput(users, figures["candidate"], figures["reference"], figures.get("anchor"))
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


def _figures(
    policy: Policy, cases: EvaluationCases, eligible: list[str]
) -> tuple[tuple[str, ...], PolicyFigures]:
    """Slate ranking and NDCG@10 of one policy; trainer.evaluation takes this over when it is there."""
    import math

    import torch

    from policies.policy import UserContext
    from policies.prompt import prompt_ids
    from policies.scoring import answer_log_probs, pack

    users = tuple(sorted({*cases.slates["user_id"].to_pylist(), *cases.ranking["user_id"].to_pylist()}))
    place = {user: row for row, user in enumerate(users)}
    slate: list[list[float]] = [[] for _ in users]
    full: list[list[float]] = [[] for _ in users]
    for row in cases.slates.to_pylist():
        prompt = prompt_ids(policy.tokens, row["history"])
        with torch.no_grad():
            batch = pack([prompt], [[policy.tokens.answer(i) for i in row["items"]]], policy.tokens.pad)
            scores = answer_log_probs(policy.model, batch)[0].tolist()
        liked = [s for s, level in zip(scores, row["levels"], strict=True) if level == 1]
        other = [s for s, level in zip(scores, row["levels"], strict=True) if level is not None and level < 1]
        slate[place[row["user_id"]]].append(float(np.mean([a > b for a in liked for b in other])))
    ranking = cases.ranking.to_pylist()
    contexts = [UserContext(row["user_id"], tuple(row["history"])) for row in ranking]
    lists = policy.recommend(contexts, 10, eligible=eligible, exclude_seen=False)
    shown: list[str] = []
    for row, found in zip(ranking, lists, strict=True):
        ids = [one.item_id for one in found]
        shown += ids
        gain = 1 / math.log2(2 + ids.index(row["target"])) if row["target"] in ids else 0.0
        full[place[row["user_id"]]].append(gain)
    per_user = {
        "slate": np.array([np.mean(one) if one else np.nan for one in slate]),
        "full": np.array([np.mean(one) if one else np.nan for one in full]),
    }
    coverage = len(set(shown)) / len(eligible)
    return users, PolicyFigures(policy.version, per_user, coverage, 1.0, None)
