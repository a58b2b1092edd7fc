"""What one world's demo has done, on disk: a demo that was killed goes on behind its last finished part.

Invariant: the file is replaced as a whole, after what it speaks of is complete. Everything that a part draws
or stamps (seeds, times, the log's version it starts from) is pinned here before the part begins, so that
doing an unfinished part again publishes the same events under the same ids.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "demo.json"


@dataclass
class RoundRecord:
    """One round of the loop, from the slates it showed to the policy that serves after it."""

    number: int
    served_at: float
    """Epoch seconds at which its slates are dated."""
    log_version: int
    """The log as it was when its slates were asked for."""
    reference: str
    """The policy that served."""
    levels: dict[str, int] = field(default_factory=dict)
    """Impressions of the round by what became of them: liked, neutral, disliked."""
    online: float = 0.0
    """Share of served items that the learners liked."""
    popular: float = 0.0
    """Liked rate of popularity, counted over the log at ``log_version``."""
    landed: bool = False
    """Whether all of its feedback is in the log and the attribution windows have closed."""
    round_id: str | None = None
    outcome: str | None = None
    why: str | None = None
    version: str | None = None
    """The candidate."""
    learning: float | None = None
    """Liked rate of the reference after the round, on the evaluated users; None until it is over."""
    coverage: float | None = None
    seconds: float = 0.0


@dataclass
class DemoState:
    """One world's demo."""

    options: dict[str, Any]
    started_at: float
    published: bool = False
    """The old system's log and the catalogue have landed."""
    base: str | None = None
    """Version of the base policy, once promoted."""
    frozen: float | None = None
    oracle: float | None = None
    random: float | None = None
    base_facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)
    seconds: float = 0.0
    """Time spent at work, over all starts."""
    finished: bool = False
    format: int = FORMAT

    @property
    def learning(self) -> list[float]:
        """Liked rate of the learning policy after each finished round."""
        return [one.learning for one in self.rounds if one.learning is not None]

    def write(self, home: Path) -> None:
        """Replace the file in ``home``, synced."""
        home.mkdir(parents=True, exist_ok=True)
        temporary = home / f".{NAME}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(home / NAME)


def read_state(home: Path) -> DemoState | None:
    """The state in ``home``; None where there is none that this version can read."""
    try:
        raw = json.loads((home / NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        return None
    rounds = [RoundRecord(**one) for one in raw.pop("rounds")]
    return DemoState(rounds=rounds, **raw)
