"""The lease that forbids two rounds at once, on one machine and its home directory.

One idea: it is an ``flock`` on ``home/rounds/lease``, taken by the process that runs the round and by nobody
for it. The kernel drops it when that process dies, however it dies; and a round whose scheduler was killed
still holds it, so the next scheduler does not start a second one.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TrainerError

# A look from outside (``is_held``) takes the lock for microseconds: a round that starts just then asks again.
_TRIES = 20
_PAUSE_S = 0.05


class RoundRunning(TrainerError):  # noqa: N818 - reads as what it is at the raise site
    """Another process runs a round on this home directory."""


class Lease:
    """The one lease of a home directory."""

    def __init__(self, rounds_directory: Path) -> None:
        self.path = rounds_directory / "lease"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease while the block runs. Raises RoundRunning when another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _lock(handle, tries=_TRIES):
                raise RoundRunning(
                    f"a round is already running (process {self.holder() or 'unknown'}): wait for it, or "
                    "stop that process and resume its round with `align3gr round --resume`"
                )
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(handle)

    def is_held(self) -> bool:
        """Whether a live process holds the lease now."""
        if not self.path.exists():
            return False
        handle = os.open(self.path, os.O_RDWR)
        try:
            return not _lock(handle, tries=1)
        finally:
            os.close(handle)

    def holder(self) -> int | None:
        """Process id that took the lease last; for messages only, the lock itself is the truth."""
        try:
            return int(self.path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None


def _lock(handle: int, tries: int) -> bool:
    for left in reversed(range(tries)):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:
                time.sleep(_PAUSE_S)
        else:
            return True
    return False
