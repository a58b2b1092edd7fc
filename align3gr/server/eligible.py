"""Which items may be recommended: those the catalogue lists, looked up in the background.

The set is one object until the catalogue changes, so whoever derives something from it may keep that.
"""

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class EligibleItems:
    """``items`` is None where there is no catalogue: then everything the policy knows may be recommended."""

    def __init__(self, read: Callable[[], frozenset[str] | None], *, every_seconds: float) -> None:
        """``read`` returns the listed items; it runs in this object's thread only after ``start``."""
        self.items: frozenset[str] | None = None
        self.error: str | None = None
        """Why the catalogue cannot be read right now; the last known items stay in force."""
        self._read, self._every = read, every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="catalogue", daemon=True)

    def start(self) -> None:
        """Read once before returning, then again and again."""
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        """End the background thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def refresh(self) -> None:
        """One look at the catalogue."""
        try:
            listed = self._read()
            self.error = None
        except Exception as error:  # noqa: BLE001 - a catalogue that cannot be read must not end serving
            self.error = " ".join(str(error).split()) or type(error).__name__
            log.warning("catalogue=unreadable cause=%s", self.error)
            return
        if listed != self.items:
            log.info("catalogue_items=%s", None if listed is None else len(listed))
            self.items = listed

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self.refresh()
