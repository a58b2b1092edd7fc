"""Forgetting in the rounds, and which policies learned from a person.

A policy cannot forget: what is done about one that learned from the person is for people to decide, and the
list is for them. The figures that a gate judged on name its users, so the person's entry leaves every stored
input; the decision stays as it was taken, with a note.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from features.forgetting import holding, without_user
from features.settings import FeatureSettings
from policies.registry import RegisteredPolicy, Registry

from .round_state import RoundsTable, RoundState, ended, write_json

NOTE = "forgotten.json"
GATE_INPUT = "gate_input.json"


@dataclass(frozen=True)
class Learned:
    """A policy that met the person's feedback."""

    version: str
    how: str
    """``dataset``: its round learned from their samples; ``base``: its base training came after their first
    event; ``parent``: it continues such a policy."""
    through: str
    """The dataset's id as the policy names it, the date of the training, or the parent's version."""

    def as_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def learned_from(registry: Registry, datasets: Iterable[str], first_landed: datetime | None) -> list[Learned]:
    """Policies that learned from a person whose samples were in ``datasets`` (every id these ever had)."""
    named = set(datasets)
    found: dict[str, Learned] = {}
    for policy in registry.list():
        if policy.dataset_id in named:
            found[policy.version] = Learned(policy.version, "dataset", str(policy.dataset_id))
        elif policy.parent in found:
            found[policy.version] = Learned(policy.version, "parent", str(policy.parent))
        elif _base_after(policy, first_landed):
            found[policy.version] = Learned(policy.version, "base", str(policy.created_at))
    return list(found.values())


def _base_after(policy: RegisteredPolicy, first_landed: datetime | None) -> bool:
    """A base policy learned from all that had landed."""
    if first_landed is None or policy.created_at is None or policy.parent is not None:
        return False
    return datetime.fromisoformat(policy.created_at) >= first_landed


def rounds_with(rounds: RoundsTable, settings: FeatureSettings, user_id: str) -> list[str]:
    """Rounds whose files name ``user_id``."""
    return [path.name for path in _directories(rounds) if _names(path, settings, user_id)]


def forget_in_rounds(
    rounds: RoundsTable,
    settings: FeatureSettings,
    user_id: str,
    datasets: Iterable[str],
    clock: Callable[[], datetime],
) -> list[str]:
    """Take ``user_id`` out of the rounds' files; the rounds that changed.

    An unfinished round that learned from them (its dataset is one of ``datasets``, or its files name them)
    ends as failed: it cannot go on from what is not there. The caller holds the lease.
    """
    named, changed = set(datasets), []
    for directory in _directories(rounds):
        state = _state(rounds, directory.name)
        dataset = state.steps.get("dataset", {}).get("dataset_id") if state is not None else None
        names = _names(directory, settings, user_id)
        unfinished = state is not None and state.status == "running" and (names or dataset in named)
        if state is not None and unfinished:
            message = "a person it learned from was forgotten: start a new round"
            rounds.write(ended(state, "failed", clock(), outcome=None, message=message))
        if names:
            _clean(directory, settings, user_id)
        if names or unfinished:
            _note(directory, clock())
            changed.append(directory.name)
    return changed


def without_person(given: dict[str, Any], user_id: str) -> dict[str, Any]:
    """A stored gate input less ``user_id``: an entry less in ``users`` and in every list beside it.

    Lists of that length are the users', whatever checks the gate has: figures per user, slices (but not the
    latencies, which are the machine's).
    """
    users: list[str] = given["users"]
    if user_id not in users:
        return given
    at, length = users.index(user_id), len(users)

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one if "latency" in key else cut(one) for key, one in value.items()}
        if isinstance(value, list) and len(value) == length and not any(map(_is_nested, value)):
            return [one for place, one in enumerate(value) if place != at]
        return value

    return {key: cut(value) for key, value in given.items()}


def _is_nested(value: Any) -> bool:
    return isinstance(value, dict | list)


def _directories(rounds: RoundsTable) -> list[Path]:
    if not rounds.directory.is_dir():
        return []
    return sorted(path for path in rounds.directory.iterdir() if path.is_dir())


def _state(rounds: RoundsTable, round_id: str) -> RoundState | None:
    return next((state for state in rounds.all() if state.round_id == round_id), None)


def _names(directory: Path, settings: FeatureSettings, user_id: str) -> bool:
    if holding(settings, list(directory.rglob("*.parquet")), user_id):
        return True
    return any(names_user(file, user_id) for file in _texts(directory))


def names_user(file: Path, user_id: str) -> bool:
    """Whether a JSON file names ``user_id`` as a user: an item may have the same id."""
    raw = file.read_bytes()
    if file.name == GATE_INPUT:
        return user_id in json.loads(raw).get("users", ())
    spelt = {json.dumps(user_id), json.dumps(user_id, ensure_ascii=False)}
    return any(f'"user_id":{gap}{one}'.encode() in raw for one in spelt for gap in ("", " "))


def _texts(directory: Path) -> list[Path]:
    return [file for kind in ("json", "jsonl") for file in directory.rglob(f"*.{kind}") if file.is_file()]


def _clean(directory: Path, settings: FeatureSettings, user_id: str) -> None:
    for file in holding(settings, list(directory.rglob("*.parquet")), user_id):
        without_user(file, user_id)
    file = directory / GATE_INPUT
    if file.exists():
        write_json(file, without_person(json.loads(file.read_text(encoding="utf-8")), user_id))
    for torn in directory.glob(".gate_input.json.*.tmp"):
        torn.unlink()


def _note(directory: Path, at: datetime) -> None:
    file = directory / NOTE
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    words = "a person was forgotten: the gate's input lacks their entry, the decision stays as it was taken"
    write_json(file, [*before, {"at": at.isoformat(), "note": words}])
