"""One process tails the log's versions and keeps the online store at the newest one.

Whatever changed is worked out again as a whole and pushed with the time it landed: a late event carries an
old ``occurred_at`` but a new landing, so no store takes it for stale. Position and stamps are in
``position``; a step that was cut short is done again, with a newer stamp.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..duck import connect
from ..log import FeedbackLog, LogMissing, LogSnapshot
from ..settings import FeatureSettings
from .changes import added_files, log_id
from .definitions import CREATED_AT, ITEM_PUSH, KNOWN_AT, USER_PUSH
from .position import Position, read_position, write_position
from .repository import OnlineUnavailable, exclusive, open_store
from .values import Touched, each_user_values, everything, item_values, touched

log = logging.getLogger(__name__)

POSITION = "position.json"


@dataclass(frozen=True)
class Step:
    """What one look at the log changed online."""

    version: int
    users: int
    items: int
    seconds: float


class Follower:
    """Owner of one online store: no second one may run beside it (``following`` sees to that)."""

    def __init__(
        self,
        log_uri: str | Path,
        folder: Path,
        settings: FeatureSettings,
        *,
        rebuild: bool = False,
        storage_options: dict[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``rebuild`` pushes everybody again; ``progress`` is told how many users of a step are done."""
        self._log_uri, self._folder, self._settings = log_uri, folder, settings
        self._storage_options, self._progress = storage_options, progress
        fresh = settings.online.store == "sqlite" and not (folder / "online.db").exists()
        self._store: Any = open_store(folder, settings.online)
        self._con = connect(settings)
        self._log: FeedbackLog | None = None
        self.position = read_position(folder / POSITION)
        if fresh or rebuild:
            self.position = Position(stamp=self.position.stamp)

    def step(self) -> Step | None:
        """Bring the online store to the log's newest version; None when it is there already.

        Raises LogMissing while there is no log, OnlineUnavailable when the store cannot be written.
        """
        feedback = self._opened()
        feedback.refresh()
        if feedback.version == self.position.version:
            return None
        started = time.perf_counter()
        snapshot = feedback.snapshot()
        changed = self._changed(feedback, snapshot)
        known_at = max((at for at in (changed.landed_at, self._moved(snapshot)) if at), default=None)
        items = changed.items is None or bool(changed.items)
        if changed.users or items:
            self.position = self.position.stamped(known_at)
            write_position(self._folder / POSITION, self.position)  # before the push: see position
            pushed = self._push_users(snapshot, changed.users), self._push_items(snapshot, changed.items)
        else:
            pushed = (0, 0)
        self.position = replace(self.position, version=snapshot.version, watermark=snapshot.watermark)
        write_position(self._folder / POSITION, self.position)
        return Step(snapshot.version, *pushed, seconds=time.perf_counter() - started)

    def _opened(self) -> FeedbackLog:
        if self._log is None:
            self._log = FeedbackLog.open(self._log_uri, create=False, storage_options=self._storage_options)
            found = log_id(self._log)
            if found != self.position.log_id:
                if self.position.log_id:
                    log.warning("log=another_one id=%s before=%s push=everybody", found, self.position.log_id)
                self.position = Position(log_id=found, stamp=self.position.stamp)
        return self._log

    def _changed(self, feedback: FeedbackLog, snapshot: LogSnapshot) -> Touched:
        if self.position.version < 0:
            return everything(self._con, snapshot)
        added = added_files(feedback, self.position.version, snapshot.version)
        if not added.complete:
            log.warning("log_commits=cleaned_up since=%d push=everybody", self.position.version)
            return everything(self._con, snapshot)
        return touched(self._con, snapshot, added.files, self._settings, self.position.watermark)

    def _moved(self, snapshot: LogSnapshot) -> datetime | None:
        """The watermark, where it moved: what a closed window changed was known from then on."""
        return snapshot.watermark if snapshot.watermark != self.position.watermark else None

    def _push_users(self, snapshot: LogSnapshot, user_ids: list[str]) -> int:
        done = 0
        for values in each_user_values(self._con, snapshot, self._settings, user_ids):
            for start in range(0, values.num_rows, self._settings.online.batch_users):
                batch = values.slice(start, self._settings.online.batch_users)
                self._push(USER_PUSH, batch)
                done += batch.num_rows
                if self._progress is not None:
                    self._progress(done, len(user_ids))
        return done

    def _push_items(self, snapshot: LogSnapshot, item_ids: list[str] | None) -> int:
        if item_ids is not None and not item_ids:
            return 0
        values = item_values(self._con, snapshot, item_ids)
        for start in range(0, values.num_rows, self._settings.online.batch_users):
            self._push(ITEM_PUSH, values.slice(start, self._settings.online.batch_users))
        return int(values.num_rows)

    def _push(self, source: str, values: pa.Table) -> None:
        frame = values.to_pandas()
        frame[KNOWN_AT] = frame[CREATED_AT] = self.position.stamp
        try:
            self._store.push(source, frame)
        except Exception as error:
            raise OnlineUnavailable(
                f"the online store cannot be written: {' '.join(str(error).split())}; "
                "see features.online in the settings"
            ) from error


def follow(
    log_uri: str | Path,
    folder: Path,
    settings: FeatureSettings,
    *,
    once: bool = False,
    rebuild: bool = False,
    storage_options: dict[str, str] | None = None,
    stop: threading.Event | None = None,
    stepped: Callable[[Step], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Follow until ``stop``, or (``once``) until the online store is at the version the log has now.

    A log that does not exist yet is waited for, unless ``once``. A store that is away is tried again.
    Raises OnlineUnavailable at once when another process follows into ``folder``.
    """
    stop = stop or threading.Event()
    with exclusive(folder / "follow.lock", wait=False):
        follower = Follower(
            log_uri, folder, settings, rebuild=rebuild, storage_options=storage_options, progress=progress
        )
        waiting_for = ""
        while not stop.is_set():
            try:
                step = follower.step()
                waiting_for = ""
            except (LogMissing, OnlineUnavailable) as error:
                if once:
                    raise
                if waiting_for != str(error):
                    log.warning("follow=waiting cause=%s", error)
                waiting_for, step = str(error), None
            if step is not None:
                if stepped is not None:
                    stepped(step)
                log.debug("version=%d users=%d items=%d", step.version, step.users, step.items)
            if once:
                return
            stop.wait(settings.online.poll_seconds)
