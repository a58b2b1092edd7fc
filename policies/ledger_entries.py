"""One move of the promotion ledger, and the file that holds it."""

import json
import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

Action = Literal["promote", "rollback", "hold", "resume", "anchor", "canary", "withdraw"]
_ACTIONS = get_args(Action)


@dataclass(frozen=True)
class Canary:
    """A policy that takes a share of users before it may become the reference."""

    version: str
    share: float
    """Of users, by hash: above 0, below 1."""
    began_at: datetime
    """When it took its first share; what it is judged by came after."""
    step_at: datetime
    """When it took this one."""
    seq: int
    """Of the entry that began it: tells two canaries of one version apart."""

    @property
    def words(self) -> str:
        """Share and times, for people."""
        began, step = (f"{at:%Y-%m-%d %H:%M} UTC" for at in (self.began_at, self.step_at))
        since = f"since {began}" if began == step else f"since {step}, began {began}"
        return f"{self.share:.4g} of users {since}"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "version": self.version,
            "share": self.share,
            "began_at": self.began_at.isoformat(),
            "step_at": self.step_at.isoformat(),
        }


@dataclass(frozen=True)
class LedgerEntry:
    """One move. ``source``, ``target``: the reference before and after it (``from`` and ``to`` on disk).

    Of ``canary`` and ``withdraw`` ``target`` is the canary, of ``anchor`` the anchor; the reference stays.
    """

    seq: int
    at: datetime
    who: str
    action: Action
    source: str | None
    target: str | None
    expects: str | None
    why: str
    share: float | None = None
    """Of users; of ``canary`` only."""

    @property
    def reference(self) -> str | None:
        """The reference after the move."""
        return self.source if self.action in ("anchor", "canary", "withdraw") else self.target

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of the entry's file."""
        share = {} if self.share is None else {"share": self.share}
        return {
            "seq": self.seq,
            "at": self.at.isoformat(),
            "who": self.who,
            "action": self.action,
            "from": self.source,
            "to": self.target,
            "expects": self.expects,
            "why": self.why,
            **share,
        }


def read_entry(path: Path) -> LedgerEntry | None:
    """The entry in ``path``; None (and a warning) when the file holds no whole entry."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["action"] not in _ACTIONS:
            raise ValueError(f"unknown action {raw['action']}")
        at = datetime.fromisoformat(raw["at"])
        if at.tzinfo is None:
            raise ValueError("at has no time zone")
        share = None if raw.get("share") is None else float(raw["share"])
        if raw["action"] == "canary" and (share is None or not 0.0 < share < 1.0 or not raw["to"]):
            raise ValueError("a canary needs a version and a share between 0 and 1")
        return LedgerEntry(
            seq=int(raw["seq"]),
            at=at,
            who=str(raw["who"]),
            action=raw["action"],
            source=raw["from"],
            target=raw["to"],
            expects=raw["expects"],
            why=str(raw["why"]),
            share=share,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ledger unreadable entry path=%s cause=%s", path, " ".join(str(error).split()))
        return None
