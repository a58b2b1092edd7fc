"""How far the log is behind the topic: what the table says has landed against where the partitions end.

``status`` shows it, the trainer waits on it, and ``ingest --until-caught-up`` ends by it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from features.log import FeedbackLog, LogMissing, offsets_app

from .settings import KafkaSettings
from .topics import TopicIdentity, identify, reach

_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class PartitionLag:
    """One partition: offsets are those of the next event, so ``end - next`` events wait."""

    partition: int
    next: int
    """Offset of the next event to land (the first that the topic still has, when nothing has landed)."""
    end: int

    @property
    def waiting(self) -> int:
        """Events in Kafka that have not landed."""
        return max(0, self.end - self.next)


@dataclass(frozen=True)
class Lag:
    """The whole topic."""

    topic: str
    partitions: tuple[PartitionLag, ...]

    @property
    def waiting(self) -> int:
        """Events in Kafka that have not landed."""
        return sum(one.waiting for one in self.partitions)


def lag(kafka: KafkaSettings, log_path: str | Path) -> Lag:
    """Where the log at ``log_path`` stands against the topic now; an absent log has landed nothing.

    Raises BrokerUnreachable, TopicMissing.
    """
    identity = identify(kafka)
    landed = landed_offsets(log_path, identity)
    reached = reach(kafka)
    return Lag(
        identity.topic,
        tuple(
            PartitionLag(p, max(landed.get(p, 0), reached[p].first), reached[p].end) for p in sorted(reached)
        ),
    )


def landed_offsets(log_path: str | Path, identity: TopicIdentity) -> dict[int, int]:
    """Partition -> offset of the next event to land, for partitions of which something has landed."""
    try:
        log = FeedbackLog.open(log_path, create=False)
    except LogMissing:
        return {}
    last = {
        p: log.transaction_version(offsets_app(identity.life, identity.topic, p)) for p in identity.partitions
    }
    return {partition: offset + 1 for partition, offset in last.items() if offset is not None}


class CatchUp:
    """Where the topic ended at one moment, and whether everything before that has landed, by any worker."""

    def __init__(self, kafka: KafkaSettings, log_path: str | Path) -> None:
        self._log_path = log_path
        self._identity = identify(kafka)
        self._targets = {p: at.end for p, at in reach(kafka).items() if at.end > at.first}
        self._looked_at = float("-inf")

    def taken(self, mine: Mapping[int, int]) -> bool:
        """Whether every partition of ``mine`` (partition -> next offset to decode) has come to its target."""
        return bool(mine) and all(at >= self._targets.get(p, 0) for p, at in mine.items())

    def reached(self, mine: Mapping[int, int]) -> bool:
        """``mine``: offset of the next event to land of the partitions the asking worker owns.

        The log is looked at for the others, twice a second at most.
        """
        missing = [p for p, end in self._targets.items() if mine.get(p, -1) < end]
        if not missing:
            return True
        if time.monotonic() - self._looked_at < _LOOK_EVERY_S:
            return False
        self._looked_at = time.monotonic()
        landed = landed_offsets(self._log_path, self._identity)
        return all(landed.get(p, -1) >= self._targets[p] for p in missing)
