"""What is kept of a decision: its input and itself, as JSON files of the round; and taking it again.

``gate_input.json`` is all that the decision depends on beside ``seed`` and ``settings``, which
``decision.json`` names: so it can be explained and taken again whenever the files are there.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from features.errors import BadInput

from ..errors import PoliciesError
from ..settings import GateSettings
from .decision import Decision, decide
from .figures import GateInput, OffPolicyFigures, PolicyFigures

INPUT, DECISION = "gate_input.json", "decision.json"


class NoDecision(PoliciesError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """There is no stored decision, or not all of it."""


def input_as_dict(given: GateInput) -> dict[str, Any]:
    """For JSON; a user without a case of a metric becomes null."""
    plain: dict[str, Any] = _plain(asdict(given))
    return plain


def input_of(raw: Mapping[str, Any]) -> GateInput:
    """The gate's input as it was written, to the last bit; also as written before there were slices."""
    anchor, off_policy = raw["anchor"], raw.get("off_policy")
    return GateInput(
        users=tuple(raw["users"]),
        candidate=_figures(raw["candidate"]),
        reference=_figures(raw["reference"]),
        anchor=_figures(anchor) if anchor is not None else None,
        user_slices={name: np.array(one, dtype=bool) for name, one in raw.get("user_slices", {}).items()},
        off_policy=OffPolicyFigures(**off_policy) if off_policy else None,
    )


def decision_as_dict(decision: Decision, settings: GateSettings, seed: int) -> dict[str, Any]:
    """The decision, and what it takes to take it again."""
    return {**decision.as_dict(), "seed": seed, "settings": settings.model_dump(mode="json")}


def stored_decision(directory: Path) -> dict[str, Any]:
    """The decision of a round's ``directory``. Raises NoDecision."""
    return _read(directory / DECISION)


def stored_input(directory: Path) -> dict[str, Any] | None:
    """The stored input as plain values; none where it is gone."""
    return _read(directory / INPUT) if (directory / INPUT).exists() else None


def decide_again(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the stored decision, the same taken again from the stored input). Equal unless the gate has changed.

    Raises NoDecision when the files are not there, or are from before decisions could be taken again.
    """
    stored, raw = stored_decision(directory), _read(directory / INPUT)
    if "seed" not in stored:
        raise NoDecision(
            f"{directory / DECISION} was written before decisions named their settings and seed; "
            "only its words can be read"
        )
    try:
        settings = GateSettings(**stored["settings"])
    except ValidationError as error:
        names = ", ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise NoDecision(
            f"{directory / DECISION} was taken under settings that this version does not know ({names}); "
            "take it again with the version that wrote it"
        ) from error
    decision = decide(input_of(raw), settings, seed=stored["seed"])
    again = json.loads(json.dumps(decision_as_dict(decision, settings, stored["seed"])))
    return stored, again


def same(stored: Mapping[str, Any], again: Mapping[str, Any]) -> bool:
    """Whether two decisions are equal, figure by figure (a figure that is no number equals itself)."""
    return json.dumps(stored, sort_keys=True) == json.dumps(again, sort_keys=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NoDecision(
            f"{path} is not there: the round has not come to its gate, or its record is gone"
        ) from error
    except (OSError, ValueError) as error:
        raise NoDecision(f"{path} cannot be read: {' '.join(str(error).split())}; restore it") from error
    return found


def _figures(raw: Mapping[str, Any]) -> PolicyFigures:
    given = dict(raw)
    for name in ("per_user", "item_slices"):
        if name in given:
            given[name] = {key: np.array(values, dtype=np.float64) for key, values in given[name].items()}
    if "latency_ms" in given:
        given["latency_ms"] = tuple(given["latency_ms"])
    return PolicyFigures(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype == bool:
            return value.tolist()
        return [None if np.isnan(one) else float(one) for one in value]
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
