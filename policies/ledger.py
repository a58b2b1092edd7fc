"""The promotion ledger: which policy is the reference, and every move that made it so.

One idea: an entry is a numbered JSON file that is complete before it has its name. It is written to a
temporary file, synced, and hard-linked to the next number; the link fails when somebody else took that
number, so every move is compare-and-set and names the version it expects to replace. MLflow's alias only
mirrors this. Readers skip what is no entry (temporary files, a file torn by a dying disk) and say so.
A canary is entries, too: ``canary`` gives a version a share of users, or a larger one; ``promote`` of that
version ends it well, ``withdraw`` badly, and so does whatever else moves the reference.
"""

import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from features.errors import BadInput

from .errors import PoliciesError
from .ledger_entries import Action, Canary, LedgerEntry, read_entry

log = logging.getLogger(__name__)

__all__ = [
    "BadShare",
    "Canary",
    "CanaryUnderWay",
    "LedgerConflict",
    "LedgerEntry",
    "NoCanary",
    "NothingToRollBack",
    "PromotionHeld",
    "PromotionLedger",
    "utc_now",
]

_NAME_DIGITS = 8


class LedgerConflict(PoliciesError):  # noqa: N818 - reads as what it is at the raise site
    """The reference is not what the mover expected: somebody moved it first."""


class PromotionHeld(PoliciesError):  # noqa: N818
    """Automatic promotion is held (after a rollback, or by a person) until ``policy resume``."""


class NothingToRollBack(PoliciesError, BadInput):  # noqa: N818
    """No earlier reference exists."""


class BadShare(PoliciesError, BadInput):  # noqa: N818
    """A canary's share of users that is not between 0 and 1, or does not grow."""


class CanaryUnderWay(LedgerConflict, BadInput):
    """Another policy is the canary: one at a time."""


class NoCanary(LedgerConflict, BadInput):
    """The policy is not, or no longer, the canary."""


def utc_now() -> datetime:
    """The clock of production; tests pass their own."""
    return datetime.now(UTC)


class PromotionLedger:
    """Reads and moves the reference. Safe for any number of processes; holds nothing open.

    Invariant: entry numbers are dense and never reused; the reference is a pure function of the entries.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.directory = directory
        self._clock = clock

    def reference(self) -> str | None:
        """Version of the promoted policy; None before the first promotion."""
        return _State.of(self.history()).reference

    def anchor(self) -> str | None:
        """The fixed policy every candidate is also judged against: the first promoted, or the one set."""
        return _State.of(self.history()).anchor

    def previous(self) -> str | None:
        """The reference that a rollback goes back to."""
        return _State.of(self.history()).previous

    def held(self) -> bool:
        """Whether automatic promotion is held."""
        return _State.of(self.history()).held

    def canary(self) -> Canary | None:
        """The policy that takes a share of users now."""
        return _State.of(self.history()).canary

    def reference_at(self, time: datetime) -> str | None:
        """The reference that was in force at ``time``."""
        return _State.of(entry for entry in self.history() if entry.at <= time).reference

    def history(self) -> list[LedgerEntry]:
        """All entries, oldest first."""
        entries: list[LedgerEntry] = []
        for _, path in self._numbered():
            entry = read_entry(path)
            if entry is not None:
                entries.append(entry)
        return entries

    def promote(
        self, version: str, *, expects: str | None, who: str, why: str, automatic: bool = False
    ) -> LedgerEntry:
        """Make ``version`` the reference in place of ``expects`` (None: there must be none yet).

        Raises LedgerConflict when the reference is another one or already ``version``, or another policy is
        the canary, PromotionHeld when ``automatic`` and promotion is held. A person may promote while it is
        held; the hold stays.
        """

        def move(state: "_State") -> tuple[str | None, str | None]:
            _require_reference(state, expects, f"{version} was to replace {expects or 'nothing'}")
            _may_be_introduced(version, state, automatic=automatic)
            return version, expects

        return self._append("promote", move, who, why)

    def start_canary(
        self, version: str, share: float, *, expects: str | None, who: str, why: str, automatic: bool = False
    ) -> LedgerEntry:
        """Give ``version`` a ``share`` of users beside the reference, which must be ``expects``.

        Raises BadShare, CanaryUnderWay (also for the same version), and what ``promote`` raises.
        """
        _require_share(share)

        def move(state: "_State") -> tuple[str | None, str | None]:
            if expects is None:
                raise LedgerConflict(
                    f"{version} needs a reference beside it to be a canary: promote one first"
                )
            _require_reference(state, expects, f"{version} was to stand beside {expects}")
            if state.canary is not None:
                raise CanaryUnderWay(_under_way(state.canary))
            _may_be_introduced(version, state, automatic=automatic)
            return version, expects

        return self._append("canary", move, who, why, share=share)

    def grow_canary(self, canary: Canary, share: float, *, who: str, why: str) -> LedgerEntry:
        """Give ``canary``, as it was read, a larger share.

        Raises BadShare, and NoCanary when it has ended or grown in between.
        """
        _require_share(share)
        if share <= canary.share:
            raise BadShare(f"{canary.version} has {canary.share:.4g} of users: a canary's share only grows")

        def move(state: "_State") -> tuple[str | None, str | None]:
            if state.canary != canary:
                raise NoCanary(f"the canary {canary.version} has moved on: see `align3gr policy history`")
            return canary.version, state.reference

        return self._append("canary", move, who, why, share=share)

    def withdraw(self, version: str, *, who: str, why: str) -> LedgerEntry:
        """End the canary ``version``; the reference stays, automatic promotion is held as after a rollback.

        Raises NoCanary when ``version`` is not the canary: somebody ended it first.
        """

        def move(state: "_State") -> tuple[str | None, str | None]:
            if state.canary is None or state.canary.version != version:
                now = f"{state.canary.version} is" if state.canary else "there is none"
                raise NoCanary(f"{version} is not the canary ({now}): nothing to withdraw")
            return version, state.reference

        return self._append("withdraw", move, who, why)

    def rollback(self, *, who: str, why: str, to: str | None = None) -> LedgerEntry:
        """Go back to the reference before the current one, or to ``to``; holds automatic promotion.

        Raises NothingToRollBack when there is no earlier reference or ``to`` never was one.
        """

        def move(state: "_State") -> tuple[str | None, str | None]:
            target = to if to is not None else state.previous
            if target is None:
                raise NothingToRollBack("there is no earlier reference to roll back to: see policy history")
            if target == state.reference or target not in state.known:
                raise NothingToRollBack(
                    f"{target} is not an earlier reference: `align3gr policy history` names those that are"
                )
            return target, state.reference

        return self._append("rollback", move, who, why)

    def hold(self, *, who: str, why: str) -> LedgerEntry:
        """Hold automatic promotion until ``resume``."""
        return self._append("hold", lambda state: (state.reference, state.reference), who, why)

    def resume(self, *, who: str, why: str) -> LedgerEntry:
        """Let rounds promote again."""
        return self._append("resume", lambda state: (state.reference, state.reference), who, why)

    def set_anchor(self, version: str, *, who: str, why: str) -> LedgerEntry:
        """Fix ``version`` as the anchor."""
        return self._append("anchor", lambda state: (version, state.reference), who, why)

    def _append(
        self,
        action: Action,
        move: Callable[["_State"], tuple[str | None, str | None]],
        who: str,
        why: str,
        share: float | None = None,
    ) -> LedgerEntry:
        """Decide on the state as read, take the next number; when it is gone, read and decide again."""
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            numbered = self._numbered()
            entries = [entry for _, path in numbered if (entry := read_entry(path)) is not None]
            state = _State.of(entries)
            target, expects = move(state)
            seq = (numbered[-1][0] if numbered else 0) + 1
            entry = LedgerEntry(seq, self._clock(), who, action, state.reference, target, expects, why, share)
            if self._publish(entry):
                log.info(
                    "ledger seq=%d action=%s from=%s to=%s who=%s", seq, action, entry.source, target, who
                )
                return entry

    def _publish(self, entry: LedgerEntry) -> bool:
        """Give the entry its number; False when another process took it first."""
        temporary = self.directory / f".{uuid.uuid4().hex}.tmp"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(entry.as_dict(), file)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, self.directory / f"{entry.seq:0{_NAME_DIGITS}d}.json")
        except FileExistsError:
            return False
        except OSError as error:
            raise PoliciesError(
                f"the ledger in {self.directory} cannot be written ({error.strerror}): the reference has not "
                "moved; free space or use a file system with hard links"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(self.directory)
        return True

    def _numbered(self) -> list[tuple[int, Path]]:
        """(number, path) of the entry files, in order."""
        if not self.directory.is_dir():
            return []
        paths = (path for path in self.directory.iterdir() if path.suffix == ".json" and path.stem.isdigit())
        return sorted((int(path.stem), path) for path in paths)


@dataclass
class _State:
    """The entries folded: who is the reference, who was before it, is promotion held."""

    reference: str | None = None
    anchor: str | None = None
    held: bool = False
    canary: Canary | None = None

    def __post_init__(self) -> None:
        self._line: list[str] = []
        self.known: set[str] = set()

    @classmethod
    def of(cls, entries: Iterable[LedgerEntry]) -> "_State":
        state = cls()
        for entry in entries:
            state._take(entry)
        return state

    @property
    def previous(self) -> str | None:
        """The reference that the current one replaced; rollbacks walk back along this line."""
        return self._line[-2] if len(self._line) > 1 else None

    def _take(self, entry: LedgerEntry) -> None:
        if entry.action == "hold":
            self.held = True
        elif entry.action == "resume":
            self.held = False
        elif entry.action == "anchor":
            self.anchor = entry.target
        elif entry.action == "withdraw":
            self.held, self.canary = True, None
        elif entry.action == "canary":
            self._take_canary(entry)
        elif entry.target is not None:
            if entry.action == "rollback":
                self.held = True
                del self._line[-1:]
                if entry.target in self._line:
                    while self._line.pop() != entry.target:
                        pass
            self._line.append(entry.target)
            self.known.add(entry.target)
            self.reference, self.canary = entry.target, None
            self.anchor = self.anchor or entry.target

    def _take_canary(self, entry: LedgerEntry) -> None:
        """A first share, or a larger one of the same canary."""
        assert entry.target is not None  # `read_entry` refuses a canary without a version or a share
        assert entry.share is not None
        before = self.canary
        if before is not None and before.version == entry.target:
            self.canary = replace(before, share=entry.share, step_at=entry.at)
        else:
            self.canary = Canary(entry.target, entry.share, entry.at, entry.at, entry.seq)


def _may_be_introduced(version: str, state: _State, *, automatic: bool) -> None:
    """Raises when ``version`` must not come before users now."""
    if version == state.reference:
        raise LedgerConflict(f"{version} is already the reference: nothing to promote")
    if state.canary is not None and state.canary.version != version:
        raise CanaryUnderWay(_under_way(state.canary))
    if automatic and state.held:
        raise PromotionHeld(
            f"automatic promotion is held, {version} stays a candidate: `align3gr policy resume` "
            "or `align3gr policy promote`"
        )


def _under_way(canary: Canary) -> str:
    return (
        f"{canary.version} is the canary and has {canary.share:.4g} of users: wait for it, or end it with "
        f"`align3gr policy withdraw {canary.version}`"
    )


def _require_reference(state: _State, expects: str | None, wanted: str) -> None:
    if state.reference != expects:
        raise LedgerConflict(
            f"{wanted}, but the reference is {state.reference or 'none'}: look at `align3gr policy history` "
            "and decide again"
        )


def _require_share(share: float) -> None:
    if not 0.0 < share < 1.0:
        raise BadShare(
            f"a canary's share of users is above 0 and below 1, not {share:g}; all of them: "
            "`align3gr policy promote`"
        )


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
