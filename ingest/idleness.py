"""Which partitions are idle and caught up, so that the log's watermark may follow the clock for them.

Silence alone proves nothing: the broker may be out of reach, or records may wait behind those of another
partition. A partition counts when it sent nothing for two fetch waits *and* the broker, asked now, answers
that it ends where we stand. The watermark is then the clock before that silence, never the clock now.
"""

import time
from collections.abc import Iterable, Mapping

from kafka import KafkaConsumer, TopicPartition

from .errors import OffsetsLost

_QUIET_S = 1.0
"""Silence asked for: longer than two fetch waits (``fetch_max_wait_ms`` of the worker is 250)."""
_LONGEST_INTERVAL_S = 60.0
_ANSWER_MS = 2000


class IdlePartitions:
    """Follows the polls of one consumer; says now and then which partitions may be advanced."""

    def __init__(self, topic: str, interval_s: float) -> None:
        self._topic = topic
        self._interval_s = interval_s
        self._quiet_since: dict[int, float] = {}
        self._busy_at = self._asked_at = time.monotonic()

    def note(self, owned: Iterable[int], spoke: Iterable[int]) -> None:
        """One poll: the partitions owned, and those that sent something."""
        now = time.monotonic()
        for partition in owned:
            self._quiet_since.setdefault(partition, now)
        for partition in spoke:
            self._quiet_since.pop(partition, None)
            self._busy_at = now

    def forget(self) -> None:
        """After a rebalance: start to listen again."""
        self._quiet_since.clear()

    def caught_up(self, consumer: KafkaConsumer, positions: Mapping[int, int]) -> list[int]:
        """Partitions of ``positions`` (partition -> next offset, everything before it landed) that are idle.

        Empty when it is not time yet. The longer nothing has come, the rarer it is time: an idle night costs
        a commit a minute. Raises KafkaError when the broker does not answer and OffsetsLost when a
        partition ends before our position.
        """
        now = time.monotonic()
        interval = max(self._interval_s, min((now - self._busy_at) / 20, _LONGEST_INTERVAL_S))
        if now - self._asked_at < interval:
            return []
        quiet = [p for p in positions if now - self._quiet_since.get(p, now) >= _QUIET_S]
        if not quiet:
            return []
        self._asked_at = now
        partitions = [TopicPartition(self._topic, partition) for partition in quiet]
        ends = consumer.end_offsets(partitions, timeout_ms=_ANSWER_MS)
        caught_up = []
        for tp in partitions:
            # The embedded broker's answer may be short by the last batch; a fetch's high watermark is not.
            high = consumer.highwater(tp)
            end, position = max(ends[tp], high or 0), positions[tp.partition]
            if high is not None and position > end:
                raise OffsetsLost.beyond(tp.partition, position, end)  # some brokers just send nothing then
            if end <= position:
                caught_up.append(tp.partition)
        return caught_up

    @staticmethod
    def mark(now_ms: float) -> int:
        """The watermark that caught-up partitions get when the clock shows ``now_ms`` (epoch ms)."""
        return int(now_ms - _QUIET_S * 1000)
