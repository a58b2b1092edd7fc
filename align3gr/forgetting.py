"""``align3gr forget``: one person leaves every store of a home directory, and stays out.

One idea: every step finds by itself what is still there, and a journal beside the tombstones (it names the
person by their mark only) keeps what a repetition could not find again: which datasets held them, since when
they were known. So a run that was killed anywhere is simply run again.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from features.errors import BadInput, FeaturesError
from features.forgetting import Traces, forget_in_log, holding, traces_in_log, without_user
from features.forgotten_datasets import Rewritten, datasets_with, forget_in_datasets, notes, predecessors
from features.log import FeedbackLog
from features.online.forgetting import forget_online, known_online
from features.tombstones import FOLDER, bury, read_tombstones
from features.upkeep import held_upkeep
from policies.registry import Registry
from trainer.data_hold import DataHold
from trainer.forgetting import Learned, forget_in_rounds, learned_from, names_user, rounds_with
from trainer.lease import Lease
from trainer.reproduction import FOLDER as REPRODUCED
from trainer.round_state import RoundsTable

from .settings import Settings

_ELSEWHERE = ("log", "catalogue", "datasets", "policies", "rounds", "online", "ledger", "mlflow", "codec")
"""Folders of the home directory that have a step of their own, or hold nothing about users."""


class NobodyToForget(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """No store knows the user."""


@dataclass
class Journal:
    """What is known of one forgetting, on disk under the user's mark; ``items`` only while it goes on."""

    at: str
    done: bool = False
    first_landed: str | None = None
    datasets: list[str] = field(default_factory=list)
    items: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Forgotten:
    """What one run did."""

    rows: int
    """Rows of the newest version of the log that went."""
    files: int
    """Files of the log that were written anew or deleted."""
    datasets: list[Rewritten]
    """Every dataset that held them, this time or in an earlier run."""
    rounds: list[str]
    tables: list[str]
    """Other Parquet files of the home directory that held them."""
    letters: int | None
    """Dead letters marked as gone; None when the broker was not asked or did not answer."""
    learned: list[Learned]
    left: list[str]
    """Files that still name them, which no step knows."""
    problem: str | None = None
    """Why the dead letters could not be looked through."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def forget(
    settings: Settings, user_id: str, *, clock: Callable[[], datetime], broker: bool = True
) -> Forgotten:
    """Remove ``user_id`` from every store under ``settings.home``; safe to kill and repeat.

    Raises LogMissing, NobodyToForget, RoundRunning, FeaturesError (upkeep or others are at work, a disk that
    is full), OnlineUnavailable.
    """
    home, log_path = settings.home, settings.home / "log"
    FeedbackLog.open(log_path, create=False)
    rounds = RoundsTable(home / "rounds")
    with Lease(rounds.directory).held(), held_upkeep(home / "upkeep.lock"):
        log = FeedbackLog.open(log_path, create=False)
        traces = traces_in_log(log, settings.features, user_id)
        _require_somebody(settings, user_id, traces, rounds, broker)
        at = clock()
        mark = bury(log_path, user_id, at).mark_of(user_id)
        journal = _begun(_journal(log_path, mark), settings, user_id, traces, at)
        _write(_file(log_path, mark), journal)
        files = forget_in_log(log, settings.features, user_id, home / "datasets")
        forget_in_datasets(home / "datasets", settings.features, user_id, at)
        changed = forget_in_rounds(rounds, settings.features, user_id, journal.datasets, clock)
        shutil.rmtree(home / REPRODUCED, ignore_errors=True)
        DataHold(home, settings.features, clock).forget(user_id)
        tables = _other_tables(settings, user_id)
        orphans = _only_theirs(log, settings, journal.items)
        forget_online(
            home / "online", settings.features, user_id, version=log.snapshot().version, items=orphans
        )
        letters, problem = _letters(settings, user_id) if broker else (None, None)
        journal.done, journal.items = True, []
        _write(_file(log_path, mark), journal)
    ever = predecessors(home / "datasets", set(journal.datasets))
    first = datetime.fromisoformat(journal.first_landed) if journal.first_landed else None
    return Forgotten(
        rows=traces.rows,
        files=files,
        datasets=[one for one in notes(home / "datasets") if one.was in journal.datasets],
        rounds=changed,
        tables=tables,
        letters=letters,
        learned=learned_from(Registry(home, settings.policies.registry), ever, first),
        left=_left(home, user_id),
        problem=problem,
    )


def _require_somebody(
    settings: Settings, user_id: str, traces: Traces, rounds: RoundsTable, broker: bool
) -> None:
    home = settings.home
    buried = read_tombstones(home / "log")
    known = (
        bool(traces.files)
        or (buried is not None and buried.holds(user_id))
        or bool(datasets_with(home / "datasets", settings.features, user_id))
        or bool(rounds_with(rounds, settings.features, user_id))
        or known_online(home / "online", settings.features, user_id)
        or (broker and _has_letters(settings, user_id))
    )
    if not known:
        raise NobodyToForget(
            f"nothing is known of user {user_id!r} in {home}: check the id; nothing was changed"
        )


def _begun(before: Journal | None, settings: Settings, user_id: str, traces: Traces, at: datetime) -> Journal:
    """The journal with what is found now added to what an earlier run knew."""
    journal = before or Journal(at=at.isoformat())
    journal.done = False
    found = datasets_with(settings.home / "datasets", settings.features, user_id)
    journal.datasets = sorted({*journal.datasets, *found})
    journal.items = sorted({*journal.items, *traces.items})
    if traces.first_landed is not None:
        first = traces.first_landed.isoformat()
        journal.first_landed = min(first, journal.first_landed or first)
    return journal


def _only_theirs(log: FeedbackLog, settings: Settings, items: list[str]) -> list[str]:
    """Those of ``items`` that the log knows of nobody any more."""
    from features.duck import connect, view_of

    with connect(settings.features) as con:
        view_of(con, "log", log.snapshot())
        found = con.execute(
            "select distinct item_id from log where item_id in (select unnest($items::varchar[]))",
            {"items": items},
        ).fetchall()
    return sorted(set(items) - {item for (item,) in found})


def _other_tables(settings: Settings, user_id: str) -> list[str]:
    """Tables that no other step owns: what trainings and evaluations left under the home directory."""
    files = [
        file
        for folder in sorted(settings.home.iterdir())
        if folder.is_dir() and folder.name not in _ELSEWHERE
        for file in sorted(folder.rglob("*.parquet"))
    ]
    found = holding(settings.features, files, user_id)
    for file in found:
        without_user(file, user_id)
    return [str(file.relative_to(settings.home)) for file in found]


def _left(home: Path, user_id: str) -> list[str]:
    """JSON files anywhere under ``home`` that still name the user."""
    files = [*home.rglob("*.json"), *home.rglob("*.jsonl")]
    return [
        str(file.relative_to(home)) for file in sorted(files) if file.is_file() and names_user(file, user_id)
    ]


def _letters(settings: Settings, user_id: str) -> tuple[int | None, str | None]:
    from ingest.dead_letters import forget_letters
    from ingest.errors import IngestError

    try:
        return forget_letters(settings.kafka, user_id), None
    except IngestError as error:
        return None, str(error)


def _has_letters(settings: Settings, user_id: str) -> bool:
    from ingest.dead_letters import letters_of
    from ingest.errors import IngestError

    try:
        return bool(letters_of(settings.kafka, user_id))
    except IngestError:
        return False  # said later, should anything else know them


def _file(log_path: Path, mark: str) -> Path:
    return log_path / FOLDER / "journals" / f"{mark}.json"


def _journal(log_path: Path, mark: str) -> Journal | None:
    file = _file(log_path, mark)
    return Journal(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _write(file: Path, journal: Journal) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        json.dump(asdict(journal), out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
