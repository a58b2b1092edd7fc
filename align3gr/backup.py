"""``align3gr backup`` and ``restore``: what cannot be made again, as one folder that says what it holds.

Log and catalogue are copied at a pinned version, while ingest goes on. No round, no compaction and no
forgetting runs meanwhile (their locks are held), so that datasets, rounds, policies and ledger fit together.
What is derived stays out: the online store follows the log, MLflow mirrors the registry. ``backup.json`` is
written last and names every file with its hash; the folder gets its name only then.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from features.errors import BadInput, FeaturesError
from features.log import FeedbackLog
from features.manifest import named_versions
from features.table_copy import copy_table
from features.tombstones import read_tombstones, take_over
from features.upkeep import held_upkeep
from trainer.lease import Lease

from .settings import Settings

MANIFEST = "backup.json"
FORMAT = 1
TABLES = ("log", "catalogue")
FOLDERS = (*TABLES, "datasets", "rounds", "ledger", "policies", "codec")
"""What a backup holds, in the order of copying: a policy is there before a round or the ledger names it, so
copied after them, none that they name is missing."""

_MARK = ".restoring"


class BadBackup(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """The folder is no whole backup."""


class LiveStore(FeaturesError, BadInput):  # noqa: N818
    """There is a store already where one was to be written."""


class NoPlace(FeaturesError, BadInput):  # noqa: N818
    """The backup cannot be written where it was to go."""


@dataclass(frozen=True)
class Backup:
    """What a backup says of itself."""

    format: int
    made_at: str
    log_version: int
    watermark: str | None
    files: dict[str, str]
    """Path below the folder -> sha256."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: the number of files instead of their names."""
        return {**asdict(self), "files": len(self.files)}


def back_up(settings: Settings, target: Path, *, clock: Callable[[], datetime]) -> Backup:
    """Write a backup of ``settings.home`` to the new folder ``target``.

    Raises LogMissing, NoPlace, RoundRunning, FeaturesError.
    """
    home = settings.home
    log = FeedbackLog.open(home / "log", create=False)
    _require_place(home, target)
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise NoPlace(f"{target} cannot be written: {error.strerror}; name another folder") from error
    with Lease(home / "rounds").held(), held_upkeep(home / "upkeep.lock"):
        try:
            version = copy_table(home / "log", staging / "log", also=named_versions(home / "datasets"))
            for name in FOLDERS[1:]:
                if (home / name).is_dir():
                    _copy_folder(name, home, staging)
        except (OSError, shutil.Error) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise FeaturesError(
                f"the backup cannot be written: {' '.join(str(error).split())}; free space, then start again"
            ) from error
    watermark = log.snapshot(version).watermark
    backup = Backup(
        format=FORMAT,
        made_at=clock().isoformat(),
        log_version=version,
        watermark=watermark.isoformat() if watermark else None,
        files={name: _sha256(staging / name) for name in _files(staging)},
    )
    _write_json(staging / MANIFEST, asdict(backup))
    if target.exists():
        target.rmdir()  # an empty one, looked at before
    staging.rename(target)
    return backup


def read_backup(source: Path) -> Backup:
    """What the backup in ``source`` says of itself. Raises BadBackup."""
    try:
        raw = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
        backup = Backup(**raw)
    except FileNotFoundError as error:
        raise BadBackup(
            f"{source} is no backup: it has no {MANIFEST}; name the folder that align3gr backup wrote"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise BadBackup(f"{source / MANIFEST} cannot be read: {cause}; take another backup") from error
    if backup.format > FORMAT:
        raise BadBackup(f"{source} has format {backup.format}, this version reads up to {FORMAT}; update it")
    return backup


def verify(source: Path, backup: Backup) -> None:
    """Compare every file with its hash. Raises BadBackup, naming the first that is not as it was."""
    for name, wanted in backup.files.items():
        if not _harmless(name):
            raise BadBackup(f"{source} names {name}, which lies outside of it; take another backup")
        if not (source / name).is_file():
            raise BadBackup(f"{source} lacks {name}; take another backup")
        if _sha256(source / name) != wanted:
            raise BadBackup(f"{source / name} is not the file that was backed up; take another backup")


def restore(
    settings: Settings, source: Path, *, tombstones: Path | None = None, clock: Callable[[], datetime]
) -> tuple[Backup, list[str]]:
    """Put the backup in ``source`` into the empty home directory of the settings.

    ``tombstones``: of the store as it was last, when the backup is older: who was forgotten since is
    forgotten again. Returns what the backup says of itself, and the users that were. A restore that was
    killed is run again. Raises BadBackup, LiveStore, FeaturesError.
    """
    home = settings.home
    backup = read_backup(source)
    _require_empty(home)
    verify(source, backup)
    home.mkdir(parents=True, exist_ok=True)
    (home / _MARK).write_text(f"{source}\n", encoding="utf-8")
    try:
        for name in FOLDERS:
            shutil.rmtree(home / name, ignore_errors=True)
            if (source / name).is_dir():
                shutil.copytree(source / name, home / name)
    except (OSError, shutil.Error) as error:
        raise FeaturesError(
            f"the backup cannot be restored: {' '.join(str(error).split())}; free space, then start again"
        ) from error
    again = _forget_again(settings, tombstones, clock) if tombstones is not None else []
    (home / _MARK).unlink()
    return backup, again


def _forget_again(settings: Settings, tombstones: Path, clock: Callable[[], datetime]) -> list[str]:
    from features.duck import connect, view_of

    from .forgetting import forget

    log_path = settings.home / "log"
    take_over(log_path, tombstones)
    buried = read_tombstones(log_path)
    with connect(settings.features) as con:
        view_of(con, "log", FeedbackLog.open(log_path, create=False).snapshot())
        users = con.execute("select distinct user_id from log order by 1").fetchall()
    gone = [user for (user,) in users if buried is not None and buried.holds(user)]
    for user in gone:
        forget(settings, user, clock=clock, broker=False)
    return gone


def _require_place(home: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise NoPlace(f"{target} is there already and not empty; name a new folder")
    if target.resolve().is_relative_to(home.resolve()):
        raise NoPlace(f"{target} lies in the home directory {home}; name a folder outside, on another disk")


def _require_empty(home: Path) -> None:
    """A store that was only half restored may be written over; any other may not."""
    if (home / _MARK).exists():
        return
    live = [name for name in FOLDERS if (home / name).is_dir() and any((home / name).iterdir())]
    if live:
        raise LiveStore(
            f"{home} holds a store ({', '.join(live)}); restore into an empty home "
            "(setting home), or move this one away first: nothing was changed"
        )


def _copy_folder(name: str, home: Path, staging: Path) -> None:
    if name in TABLES:
        copy_table(home / name, staging / name)
        return
    passing = shutil.ignore_patterns(".building-*", ".staging-*", ".new-*", "*.partial", "*.tmp", "lease")
    shutil.copytree(home / name, staging / name, ignore=passing)


def _files(folder: Path) -> Iterator[str]:
    return (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file())


def _harmless(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and parts[0] in FOLDERS and ".." not in parts


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_json(file: Path, value: Any) -> None:
    with file.open("w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
