"""Any interleaving of workers that lose, steal and resume partitions lands every offset exactly once.

A worker here is what an ingest worker does with the log, without Kafka: it believes in the partitions it was
last told of, which may long belong to somebody else (it was stopped and continued).
"""

import random
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.log import LOG_SCHEMA, FeedbackLog, LogConflict, offsets_app, watermark_app

PARTITIONS = 3
COLUMNS = ["kafka_partition", "kafka_offset"]
STREAM = 40
"""Events of each partition."""


class Worker:
    """Takes batches from ``partitions`` and lands them; on a conflict it reads its positions again."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self._path, self._rng = path, rng
        self.partitions: set[int] = set()
        self.conflicts = 0
        self._log: FeedbackLog | None = None
        self._next: dict[int, int] = {}

    def claim(self, partitions: set[int]) -> None:
        self.partitions = set(partitions)
        self._log = FeedbackLog.open(self._path)
        self._next = {}
        for partition in partitions:
            landed = self._log.transaction_version(offsets_app("c", "t", partition))
            self._next[partition] = 0 if landed is None else landed + 1

    def step(self) -> None:
        rows, moves = [], {}
        for partition in self.partitions:
            first = self._next[partition]
            last = min(first + self._rng.randint(0, 4), STREAM) - 1
            rows += [(partition, offset) for offset in range(first, last + 1)]
            if last >= first:
                moves[offsets_app("c", "t", partition)] = last
                moves[watermark_app("c", "t", partition)] = 1000 * last
        if not moves:
            return
        table = pa.Table.from_pylist(
            [
                {
                    "event_id": f"{p}-{n}",
                    "landed_on": date(2026, 5, 1),
                    "kafka_partition": p,
                    "kafka_offset": n,
                }
                for p, n in rows
            ],
            schema=LOG_SCHEMA,
        )
        assert self._log is not None
        try:
            self._log.append(table, moves)
        except LogConflict:
            self.conflicts += 1
            self.claim(self.partitions)
            return
        for partition, offset in rows:
            self._next[partition] = offset + 1


@pytest.mark.parametrize("seed", range(4))
def test_every_offset_lands_exactly_once_whoever_believes_to_own_it(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    workers = [Worker(tmp_path / "log", rng) for _ in range(3)]
    for worker in workers:
        worker.claim({n for n in range(PARTITIONS) if rng.random() < 0.6})
    for _ in range(70):
        worker = rng.choice(workers)
        chance = rng.random()
        if (
            chance < 0.15
        ):  # a rebalance that only this worker hears of: partitions now have two owners or none
            worker.claim({n for n in range(PARTITIONS) if rng.random() < 0.6})
        elif chance < 0.2:
            FeedbackLog.open(tmp_path / "log").table.optimize.compact()
        else:
            worker.step()
    last = Worker(tmp_path / "log", rng)
    last.claim(set(range(PARTITIONS)))
    for _ in range(2 * STREAM):
        last.step()
    snapshot = FeedbackLog.open(tmp_path / "log").snapshot()
    landed = [
        pair
        for file in snapshot.files
        for pair in zip(*pq.read_table(file, columns=COLUMNS).to_pydict().values(), strict=True)
    ]
    assert sorted(landed) == [(p, n) for p in range(PARTITIONS) for n in range(STREAM)]
    assert sum(worker.conflicts for worker in workers) > 0  # or the test tested nothing
    assert snapshot.watermark == datetime.fromtimestamp(STREAM - 1, UTC)
