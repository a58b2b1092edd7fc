"""Tombstones: who was forgotten, so that no replay brings them back.

A tombstone is a keyed hash of the user's id, never the id: ``BLAKE2b-128(key, user_id)`` with a random key
of the store's own. All lie in one file in the log's folder, under a name that Delta leaves alone, so that
whoever may write the log sees them. Looking costs one ``stat`` a batch while nobody was forgotten, and one
hash for each user of a batch from then on.
"""

import json
import os
import secrets
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from .errors import FeaturesError

FOLDER = "_forgotten"
"""Folder of the log for what forgetting leaves behind; Delta's vacuum passes over such names."""

_FILE = "tombstones.json"
_KEY_BYTES = 32
_HASH_BYTES = 16


@dataclass(frozen=True)
class Tombstones:
    """The marks of all who were forgotten. Invariant: no user id is in it."""

    key: bytes
    marks: frozenset[str]

    def mark_of(self, user_id: str) -> str:
        """The user's mark: 32 hexadecimal digits."""
        return blake2b(user_id.encode(), key=self.key, digest_size=_HASH_BYTES).hexdigest()

    def holds(self, user_id: str) -> bool:
        """Whether the user was forgotten."""
        return self.mark_of(user_id) in self.marks

    def without(self, rows: pa.Table) -> pa.Table:
        """``rows`` (with a column user_id) less those of forgotten users, order kept."""
        users = pc.unique(rows.column("user_id")).to_pylist()
        gone = [user_id for user_id in users if user_id is not None and self.holds(user_id)]
        if not gone:
            return rows
        return rows.filter(pc.invert(pc.is_in(rows.column("user_id"), pa.array(gone, pa.string()))))

    def names(self, raw: bytes | None) -> bool:
        """Whether ``raw``, an event that was refused, says that it is of a forgotten user."""
        try:
            event = json.loads(raw or b"")
        except ValueError:
            return False
        user_id = event.get("user_id") if isinstance(event, dict) else None
        return isinstance(user_id, str) and self.holds(user_id)


class TombstoneWatch:
    """The tombstones of one log as they are now, read again when their file changes."""

    def __init__(self, log_path: str | Path) -> None:
        self._file = _file(log_path)
        self._seen: tuple[int, ...] = ()
        self._known: Tombstones | None = None

    def current(self) -> Tombstones | None:
        """None while nobody was forgotten. Raises FeaturesError when the file cannot be read."""
        try:
            found = self._file.stat()
        except FileNotFoundError:
            return None
        seen = found.st_mtime_ns, found.st_size, found.st_ino
        if seen != self._seen:
            self._known, self._seen = _read(self._file), seen
        return self._known if self._known is not None and self._known.marks else None


def read_tombstones(log_path: str | Path) -> Tombstones | None:
    """The tombstones of the log in folder ``log_path``; None when there never was one.

    Raises FeaturesError when the file cannot be read: to go on without it would bring people back.
    """
    file = _file(log_path)
    return _read(file) if file.exists() else None


def bury(log_path: str | Path, user_id: str, at: datetime) -> Tombstones:
    """Leave a tombstone for ``user_id``, durably; one that is there stays. Returns all of them."""
    file = _file(log_path)
    raw: dict[str, Any] = {"key": secrets.token_hex(_KEY_BYTES), "tombstones": []}
    if file.exists():
        raw = _raw(file)
    known = _parsed(raw)
    if not known.holds(user_id):
        raw["tombstones"].append({"mark": known.mark_of(user_id), "at": at.isoformat()})
        _write(file, raw)
    return _parsed(raw)


def take_over(log_path: str | Path, other: Path) -> None:
    """Make the file ``other`` the log's tombstones: its key, its marks. For a restore of an older backup.

    Raises FeaturesError when ``other`` is no such file, or the log's own have another key.
    """
    wanted, file = _raw(other), _file(log_path)
    _parsed(wanted)
    if file.exists():
        own = _raw(file)
        if own["key"] != wanted["key"]:
            raise FeaturesError(f"{other} belongs to another store: its key is not the one of {file}")
        known = {one["mark"] for one in wanted["tombstones"]}
        wanted["tombstones"] += [one for one in own["tombstones"] if one["mark"] not in known]
    _write(file, wanted)


def _file(log_path: str | Path) -> Path:
    return Path(str(log_path).removeprefix("file://")) / FOLDER / _FILE


def _read(file: Path) -> Tombstones:
    return _parsed(_raw(file))


def _raw(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        bytes.fromhex(raw["key"])
        [one["mark"] for one in raw["tombstones"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise FeaturesError(
            f"the tombstones in {file} cannot be read ({cause}); restore the file from a backup: without it "
            "a replay brings back who was forgotten"
        ) from error
    return dict(raw)


def _parsed(raw: dict[str, Any]) -> Tombstones:
    return Tombstones(bytes.fromhex(raw["key"]), frozenset(one["mark"] for one in raw["tombstones"]))


def _write(file: Path, raw: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        os.fchmod(out.fileno(), 0o640)  # who reads the key can test guessed ids against the marks
        json.dump(raw, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
