"""Keeps the policy that the promotion ledger names, and swaps it without anyone noticing.

A policy, its codec and its trie are one object, so a swap is one assignment: a request in flight finishes
with the policy it began with. One thread watches the ledger, another loads; the newest registered candidate
and the last reference are kept warm, so promotion and rollback need no load. A reference that cannot be
loaded is said (health, metrics, log) while the last good policy serves on; it is tried again now and then.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .metrics import ServerMetrics

log = logging.getLogger(__name__)

P = TypeVar("P")

RETRY_SECONDS = 5.0
"""Pause before a policy that could not be loaded is tried again: the disk may have been the cause."""


@dataclass(frozen=True)
class Served(Generic[P]):
    """What serves requests right now."""

    version: str
    policy: P


@dataclass(frozen=True)
class SwapState:
    """For health: what serves, what should, and why it does not."""

    serving: str | None
    reference: str | None
    error: str | None


@dataclass(frozen=True)
class _Failure:
    error: str
    again_at: float


class PolicySwap(Generic[P]):
    """Follows a ledger. ``current`` may be read from any thread at any time."""

    def __init__(
        self,
        reference: Callable[[], str | None],
        load: Callable[[str], P],
        metrics: ServerMetrics,
        *,
        candidates: Callable[[], Sequence[str]] = tuple,
        poll_seconds: float = 0.2,
        warm: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``reference`` reads the ledger, ``load`` a version (raising when it cannot); ``candidates`` names
        the registered versions, oldest first; ``warm`` policies are kept beside the served one.
        """
        self.current: Served[P] | None = None
        self._reference, self._load, self._candidates = reference, load, candidates
        self._metrics, self._poll_seconds, self._warm, self._clock = metrics, poll_seconds, warm, clock
        self._wanted: str | None = None
        self._wanted_since = 0.0
        self._before: str | None = None
        self._loaded: dict[str, P] = {}
        self._failed: dict[str, _Failure] = {}
        self._ledger_error: str | None = None
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Load the reference, if there is one, before returning; then follow the ledger in the background."""
        self.look()
        if self._wanted is not None:
            self.load_next()
        for name, loop in (("policy-watch", self._watch), ("policy-load", self._load_loop)):
            thread = threading.Thread(target=loop, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop following; ``current`` stays."""
        self._stop.set()
        self._work.set()
        for thread in self._threads:
            thread.join(timeout=10)

    def state(self) -> SwapState:
        """What serves, what should, and the cause when they differ."""
        served, wanted = self.current, self._wanted
        failure = self._failed.get(wanted) if wanted else None
        return SwapState(
            serving=served.version if served else None,
            reference=wanted,
            error=failure.error if failure else self._ledger_error,
        )

    def look(self) -> None:
        """One look at the ledger: swap at once when the new reference is loaded already."""
        try:
            wanted = self._reference()
            self._ledger_error = None
        except Exception as error:  # noqa: BLE001 - whatever keeps us from the ledger, we keep serving and say so
            self._ledger_error = f"the promotion ledger cannot be read: {_line(error)}"
            log.warning("ledger=unreadable cause=%s", self._ledger_error)
            return
        with self._lock:
            if wanted != self._wanted:
                self._wanted, self._wanted_since = wanted, self._clock()
                if wanted is not None:
                    self._failed.pop(wanted, None)
            self._swap_if_loaded()
        if self._next_to_load() is not None:
            self._work.set()

    def load_next(self) -> bool:
        """Load what is needed most: the reference, else the newest candidate. False when nothing is."""
        version = self._next_to_load()
        if version is None:
            return False
        started = time.perf_counter()
        try:
            policy = self._load(version)
        except Exception as error:  # noqa: BLE001 - a policy may be broken in any way; the last good one serves on
            with self._lock:
                self._failed[version] = _Failure(_line(error), self._clock() + RETRY_SECONDS)
            if version == self._wanted:
                self._metrics.swap_failures.inc()
                self._metrics.behind.set(1)
                log.error("policy=%s load=failed cause=%s", version, _line(error))
            else:
                log.warning("candidate=%s load=failed cause=%s", version, _line(error))
            return True
        log.info("policy=%s load=done seconds=%.3f", version, time.perf_counter() - started)
        with self._lock:
            self._failed.pop(version, None)
            self._loaded[version] = policy
            self._swap_if_loaded()
        return True

    def _swap_if_loaded(self) -> None:
        """The swap itself; the caller holds the lock."""
        wanted, served = self._wanted, self.current
        if wanted is None or (served is not None and served.version == wanted) or wanted not in self._loaded:
            self._metrics.behind.set(
                int(served is not None and wanted is not None and served.version != wanted)
            )
            return
        before = served.version if served else None
        self.current = Served(wanted, self._loaded[wanted])
        self._before = before
        self._metrics.now_serving(wanted, before)
        self._metrics.behind.set(0)
        seconds = self._clock() - self._wanted_since
        if before is not None:
            self._metrics.swaps.inc()
            self._metrics.swap_seconds.set(seconds)
        log.info("policy=%s swapped_for=%s seconds=%.3f", wanted, before, seconds)
        keep = {wanted, *self._warm_versions()}
        for version in [known for known in self._loaded if known not in keep]:
            del self._loaded[version]

    def _warm_versions(self) -> list[str]:
        """What is worth keeping beside the reference, the newest candidate first."""
        if self._warm == 0:
            return []
        newest = list(self._candidates())[-1:]
        before = [self._before] if self._before is not None else []
        return [version for version in (*newest, *before) if version != self._wanted][: self._warm]

    def _next_to_load(self) -> str | None:
        wanted = self._wanted
        served = self.current
        for version in [*([wanted] if wanted else []), *self._warm_versions()]:
            if version in self._loaded or (served is not None and served.version == version):
                continue
            failure = self._failed.get(version)
            if failure is None or (version == wanted and failure.again_at <= self._clock()):
                return version
        return None

    def _watch(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            self.look()

    def _load_loop(self) -> None:
        while not self._stop.is_set():
            self._work.wait()
            self._work.clear()
            while not self._stop.is_set() and self.load_next():
                pass


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
