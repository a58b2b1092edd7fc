"""How far the follower has come: a small file beside the online store, replaced in one step.

The stamp is written *before* a push and the version after it. A follower killed in between pushes the same
users again, with a newer stamp, so a store that ignores values that are not newer never keeps an old one.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from .repository import OnlineUnavailable

_TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class Position:
    """``version``: newest version of the log that is wholly online (-1: none)."""

    log_id: str = ""
    """Delta's id of the table: another table under the same path starts from nothing."""
    version: int = -1
    watermark: datetime | None = None
    """The log's watermark at that version: impression windows were closed up to it."""
    stamp: datetime | None = None
    """Newest timestamp that was ever about to be pushed."""

    def stamped(self, landed_at: datetime | None) -> "Position":
        """The next stamp: when the newest row became known, but always after the last one.

        Two commits may carry the same ``landed_at``, and a worker's clock may be behind another's.
        """
        known = landed_at + _TICK if landed_at else None
        after = self.stamp + _TICK if self.stamp else None
        newest = max(
            (at for at in (known, after) if at is not None), default=datetime(1970, 1, 2, tzinfo=UTC)
        )
        return replace(self, stamp=newest)


def read_position(path: Path) -> Position:
    """The position on disk; the start when there is none.

    Raises OnlineUnavailable when the file holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Position(
            log_id=str(raw["log_id"]),
            version=int(raw["version"]),
            watermark=_time(raw["watermark"]),
            stamp=_time(raw["stamp"]),
        )
    except FileNotFoundError:
        return Position()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OnlineUnavailable(
            f"{path} is no position of a follower ({error}); delete it to push everything again"
        ) from error


def write_position(path: Path, position: Position) -> None:
    """Replace the file at once, synced: half a position is never read.

    Raises OnlineUnavailable when it cannot be written (a full disk).
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(position), file, default=lambda at: at.isoformat())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OnlineUnavailable(
            f"the follower's position {path} cannot be written: {error.strerror}; free some space"
        ) from error


def _time(raw: str | None) -> datetime | None:
    return datetime.fromisoformat(raw) if raw else None
