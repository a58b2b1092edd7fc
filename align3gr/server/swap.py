"""Keeps the policy that the promotion ledger names, and swaps it without anyone noticing.

A policy, its codec and its trie are one object, so a swap is one assignment: a request in flight finishes
with the policy it began with. One thread watches the ledger, another loads; the newest registered candidate
and the last reference are kept warm, so promotion and rollback need no load. A reference that cannot be
loaded is said (health, metrics, log) while the last good policy serves on; it is tried again now and then.
A canary stands beside the reference as ``trial`` once it is loaded; one that was refused here is never served
again, and is withdrawn in the ledger at every look until the ledger has it.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from .metrics import ServerMetrics

if TYPE_CHECKING:
    from policies.ledger import Canary

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
class Trial(Served[P]):
    """What serves the canary's share of users right now."""

    canary: "Canary"


@dataclass(frozen=True)
class SwapState:
    """For health: what serves, what should, and why it does not."""

    serving: str | None
    reference: str | None
    error: str | None
    canary: str | None = None
    canary_share: float | None = None
    """Both as the ledger has them and this server serves them."""


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
        canary: "Callable[[], Canary | None]" = lambda: None,
        withdraw: Callable[[str, str], object] = lambda version, why: None,  # noqa: ARG005
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``reference`` reads the ledger, ``load`` a version (raising when it cannot); ``candidates`` names
        the registered versions, oldest first; ``warm`` policies are kept beside the served one. ``canary``
        reads the ledger's canary, ``withdraw`` ends it there: version, why.
        """
        self.current: Served[P] | None = None
        self.trial: Trial[P] | None = None
        self._read_canary, self._withdraw = canary, withdraw
        self._canary: Canary | None = None
        self._refused: dict[int, str] = {}
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
        served, wanted, trial = self.current, self._wanted, self.trial
        failure = self._failed.get(wanted) if wanted else None
        return SwapState(
            serving=served.version if served else None,
            reference=wanted,
            error=failure.error if failure else self._ledger_error,
            canary=trial.version if trial else None,
            canary_share=trial.canary.share if trial else None,
        )

    def refuse(self, canary: "Canary", why: str) -> None:
        """Serve ``canary`` no more, from now on; the next look withdraws it in the ledger."""
        with self._lock:
            if canary.seq in self._refused:
                return
            self._refused[canary.seq] = why
            self._put_on_trial()
        log.error("canary=%s refused why=%s", canary.version, why)

    def look(self) -> None:
        """One look at the ledger: swap at once when the new reference is loaded already."""
        try:
            wanted, canary = self._reference(), self._read_canary()
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
            if canary is not None and (self._canary is None or self._canary.seq != canary.seq):
                self._failed.pop(canary.version, None)
            self._canary = canary if canary is not None and canary.version != wanted else None
            self._swap_if_loaded()
            self._put_on_trial()
        self._withdraw_refused()
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
                canary = self._canary
            if canary is not None and canary.version == version:
                self.refuse(canary, f"it cannot be loaded: {_line(error)}")
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
            self._put_on_trial()
        return True

    def _put_on_trial(self) -> None:
        """The canary that serves: the ledger's, once it is loaded, and not refused. Caller holds the lock."""
        canary = self._canary
        if canary is None or canary.seq in self._refused or canary.version not in self._loaded:
            trial = None
        else:
            trial = Trial(canary.version, self._loaded[canary.version], canary)
        before = self.trial
        if (trial.canary if trial else None) != (before.canary if before else None):
            share = trial.canary.share if trial else 0.0
            self._metrics.canary_share.set(share)
            log.info("canary=%s share=%g", trial.version if trial else None, share)
            self.trial = trial

    def _withdraw_refused(self) -> None:
        """Tell the ledger what was refused here; where that fails, again at the next look."""
        canary = self._canary
        why = self._refused.get(canary.seq) if canary is not None else None
        if canary is None or why is None:
            return
        try:
            self._withdraw(canary.version, why)
        except Exception as error:  # noqa: BLE001 - it is served by nobody here; the next look tries again
            log.warning("canary=%s withdraw=failed cause=%s", canary.version, _line(error))

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
        keep = {wanted, *self._beside()}
        for version in [known for known in self._loaded if known not in keep]:
            del self._loaded[version]

    def _warm_versions(self) -> list[str]:
        """What is worth keeping beside the reference, the newest candidate first."""
        if self._warm == 0:
            return []
        newest = list(self._candidates())[-1:]
        before = [self._before] if self._before is not None else []
        return [version for version in (*newest, *before) if version != self._wanted][: self._warm]

    def _beside(self) -> list[str]:
        """What is loaded beside the reference, most needed first: the canary, then what is kept warm."""
        canary = self._canary
        on_trial = [canary.version] if canary is not None and canary.seq not in self._refused else []
        return list(dict.fromkeys([*on_trial, *self._warm_versions()]))

    def _next_to_load(self) -> str | None:
        wanted = self._wanted
        served = self.current
        for version in [*([wanted] if wanted else []), *self._beside()]:
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
