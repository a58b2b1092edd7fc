"""Retention: landed days leave the log's newest version, and dataset snapshots go, when they are old enough.

Never what a live policy needs: its dataset stays, and through the manifest the version of the log that it was
built from, whatever its age (vacuum keeps the files of every version that a manifest names). Time is given by
the caller's clock; one that is behind what already landed is refused.
"""

import logging
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

from .duck import connect
from .errors import BadInput, FeaturesError
from .forgetting import landed_days, remove_days
from .forgotten_datasets import successor
from .log import FeedbackLog
from .manifest import MANIFEST, read_manifest
from .settings import FeatureSettings

_log = logging.getLogger(__name__)

_TOLERANCE = timedelta(days=1)


class ClockBehind(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """The clock is behind what has landed."""


@dataclass(frozen=True)
class Aged:
    """What aged out."""

    days: list[date] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    """Users of whom the log's newest version holds nothing any more."""
    datasets: list[str] = field(default_factory=list)


def age_out(
    log: FeedbackLog, datasets: Path, settings: FeatureSettings, *, live: Collection[str], now: datetime
) -> Aged:
    """Apply ``settings.retention`` as of ``now``.

    ``live``: ids of the datasets that live policies learned from, as they name them. The caller holds the
    lock of upkeep, and sees to it that no round is being built. Raises ClockBehind, and deletes nothing.
    """
    wanted = settings.retention
    if wanted.log_days is None and wanted.dataset_days is None:
        return Aged()
    days = landed_days(log)
    if days and days[-1] > (now + _TOLERANCE).date():
        raise ClockBehind(
            f"the clock says {now:%Y-%m-%d %H:%M}, but feedback landed on {days[-1]}: set this machine's "
            "clock; nothing was deleted"
        )
    gone: list[date] = []
    users: list[str] = []
    if wanted.log_days is not None and days:
        before = min(now.date() - timedelta(days=wanted.log_days), days[-1])
        gone = [day for day in days if day < before]
        users = _only_in(settings, log, remove_days(log, before)) if gone else []
    dropped = _drop_datasets(datasets, wanted.dataset_days, live, now)
    if gone or dropped:
        _log.info("retention days=%d users=%d datasets=%s", len(gone), len(users), ",".join(dropped))
    return Aged(gone, users, dropped)


def _only_in(settings: FeatureSettings, log: FeedbackLog, files: list[Path]) -> list[str]:
    """Users of ``files`` that the newest version does not know."""
    newest = log.snapshot().files
    with connect(settings) as con:
        found = con.execute(
            "select distinct user_id from read_parquet($old) where user_id not in "
            "(select user_id from read_parquet($new)) order by 1",
            {"old": [str(file) for file in files], "new": newest},
        ).fetchall()
    return [user_id for (user_id,) in found]


def _drop_datasets(datasets: Path, days: int | None, live: Collection[str], now: datetime) -> list[str]:
    if days is None:
        return []
    kept = {successor(datasets, dataset_id) or dataset_id for dataset_id in live}
    dropped = []
    for folder in sorted(path.parent for path in datasets.glob(f"[!.]*/{MANIFEST}")):
        if folder.name in kept or read_manifest(folder).built_at > now - timedelta(days=days):
            continue
        gone = datasets / f".building-{folder.name}-aged"  # no dataset any more, whole or not
        folder.rename(gone)
        shutil.rmtree(gone)
        dropped.append(folder.name)
    return dropped
