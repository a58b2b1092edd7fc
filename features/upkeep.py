"""Upkeep of the feedback log: small files into large ones, and files that nobody needs any more away.

One owner at a time, by a lock file beside the log's home. Compaction changes no row, no offset and no app
transaction; vacuum keeps every version that a dataset's manifest names, and everything younger than the
retention, since readers may still hold it and writers may not have committed it yet.
"""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.fs import DeltaStorageHandler
from pyarrow import fs

from .errors import FeaturesError
from .forgetting import drop_replacements
from .log import COMMITS_KEPT_DAYS, FeedbackLog
from .manifest import named_versions
from .settings import UpkeepSettings

_log = logging.getLogger(__name__)

_FULL_FROM_HOURS = 1
"""Below this retention, files without a commit are left alone: a running append may be writing them."""


@dataclass(frozen=True)
class UpkeepReport:
    """What one look at the table did."""

    owner: bool
    """False when another process has the lock: nothing was done."""
    files_before: int = 0
    files_after: int = 0
    compacted: bool = False
    deleted: int = 0
    """Files that vacuum removed."""
    kept_versions: tuple[int, ...] = ()
    """Versions that manifests name."""
    seconds: float = 0.0


def keep_up(
    log: FeedbackLog,
    datasets_dir: Path,
    lock_file: Path,
    settings: UpkeepSettings,
    *,
    now: datetime | None = None,
) -> UpkeepReport:
    """Compact when enough small files have gathered, then vacuum, then forget commits nobody can ask for.

    Safe beside running writers and readers. ``now`` is the wall clock unless given.

    Raises DatasetMissing when a manifest cannot be read: then nothing is deleted.
    """
    now = now or datetime.now(UTC)
    with upkeep_lock(lock_file) as owner:
        if not owner:
            return UpkeepReport(owner=False)
        started = time.monotonic()
        before = len(log.snapshot().files)
        compacted = compact(log, settings)
        deleted, kept = vacuum(log, datasets_dir, settings)
        if compacted:
            forget_commits(log, kept, now)
        report = UpkeepReport(
            owner=True,
            files_before=before,
            files_after=len(log.snapshot().files),
            compacted=compacted,
            deleted=len(deleted),
            kept_versions=kept,
            seconds=round(time.monotonic() - started, 3),
        )
        if compacted or deleted:
            _log.info(
                "upkeep files_before=%d files_after=%d deleted=%d seconds=%.2f",
                report.files_before, report.files_after, report.deleted, report.seconds,
            )  # fmt: skip
        return report


def compact(log: FeedbackLog, settings: UpkeepSettings) -> bool:
    """Rewrite small files as large ones when at least ``compact_from_files`` lie there; True when it did.

    An append in the meantime is no conflict. Another compaction is: then this one has nothing left to do.
    """
    table = _newest(log)
    sizes = table.get_add_actions().column("size_bytes").to_pylist()
    small = sum(size < settings.target_file_bytes // 2 for size in sizes)
    if small < settings.compact_from_files:
        return False
    try:
        table.optimize.compact(
            target_size=settings.target_file_bytes,
            commit_properties=CommitProperties(max_commit_retries=100),
        )
    except CommitFailedError as error:
        _log.warning("compaction=skipped cause=%s", " ".join(str(error).split()))
        return False
    return True


def vacuum(
    log: FeedbackLog, datasets_dir: Path, settings: UpkeepSettings
) -> tuple[list[str], tuple[int, ...]]:
    """Delete files older than the retention that neither the newest version nor a manifest's needs.

    Returns the deleted files and the versions that manifests name.
    """
    table = _newest(log)
    kept = tuple(sorted(version for version in named_versions(datasets_dir) if version <= table.version()))
    full = settings.retention_hours >= _FULL_FROM_HOURS

    def run(dry: bool) -> list[str]:
        return table.vacuum(
            retention_hours=settings.retention_hours,
            enforce_retention_duration=False,
            dry_run=dry,
            full=full,
            keep_versions=list(kept),
        )

    # A vacuum is two commits of its own, and Delta names deleted files until their tombstones expire: look.
    store = fs.PyFileSystem(DeltaStorageHandler.from_table(table._table))
    there = [info.path for info in store.get_file_info(run(dry=True)) if info.type != fs.FileType.NotFound]
    if there:
        run(dry=False)
    drop_replacements(log, kept)
    return there, kept


def forget_commits(log: FeedbackLog, kept: tuple[int, ...], now: datetime) -> bool:
    """Remove commits older than ``COMMITS_KEPT_DAYS`` that a checkpoint covers; True when it looked for them.

    Nothing is removed while a manifest names a version that old: it could not be opened any more.
    """
    table = _newest(log)
    if kept:
        store = fs.PyFileSystem(DeltaStorageHandler.from_table(table._table))
        (oldest,) = store.get_file_info([f"_delta_log/{kept[0]:020d}.json"])
        limit = now - timedelta(days=COMMITS_KEPT_DAYS - 1)
        if oldest.type == fs.FileType.NotFound or oldest.mtime < limit:
            return False
    table.cleanup_metadata()
    return True


def _newest(log: FeedbackLog) -> DeltaTable:
    """A handle of our own: the log's may belong to a writer."""
    return DeltaTable(log.uri, storage_options=log.storage_options)


@contextmanager
def upkeep_lock(file: Path) -> Iterator[bool]:
    """Whether this process owns the table's upkeep; the system frees the lock when the owner dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def held_upkeep(lock_file: Path, *, wait_s: float = 30.0) -> Iterator[None]:
    """Own the table's upkeep while the block runs: nothing is compacted, nothing deleted.

    Raises FeaturesError when another process owns it for longer than ``wait_s``.
    """
    until = time.monotonic() + wait_s
    while True:
        with upkeep_lock(lock_file) as owner:
            if owner:
                yield
                return
        if time.monotonic() > until:
            raise FeaturesError("the log's upkeep goes on all the time; run the same command again")
        time.sleep(0.1)
