"""The rows of one stage on their way into a dataset: straight to disk, or by way of drafts.

Where the whole stage decides what a row is (how many older samples are replayed, what the mean weight is),
each shard is drafted to a file of its own first; when the last one is there, the drafts are read again one by
one. Rows are sorted within a shard and shards follow each other, so the dataset's order holds either way.
"""

from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .events import Numbered
from .manifest import Stage, StageCounts
from .queries import execute, fetch
from .rows_hash import RowsHash

FINISHING = ["preference_figures", "preference_finished"]

_DRAFTED = ["preferred", "recency", "inverse_propensity"]


class StageRows:
    """One stage at work: ``add`` shard after shard, ``finish``, then ``counts``; ``close`` in any case."""

    def __init__(
        self, stage: Stage, folder: Path, schema: pa.Schema, values: dict[str, Any], *, by_draft: bool
    ) -> None:
        """``schema``: of the finished rows; ``values``: what the queries name."""
        self._schema, self._values = schema, values
        self._writer = pq.ParquetWriter(folder / f"{stage}.parquet", schema, compression="zstd")
        self._drafts: list[Path] | None = [] if by_draft else None
        self._draft = f"{folder}/.{stage}-draft-"
        self._hash = RowsHash(schema.names[1:])
        self._available = self._older = 0
        self._samples = self._replayed = 0
        self._roles: dict[str, int] = {}

    def add(self, found: pa.Table, numbered: Numbered) -> None:
        """The answer of ``preference_samples``, with names for numbers."""
        first = found.filter(pc.field("first_of_user"))
        self._available += pc.sum(first.column("available")).as_py() or 0
        found = numbered.named(found, ("history", "rejected"))
        if self._drafts is None:
            self._keep(found)
        else:
            self._older += _older(found)
            names = [name for name in self._schema.names if name != "weight"]
            self._drafts.append(Path(f"{self._draft}{len(self._drafts)}.parquet"))
            pq.write_table(found.select([*names, *_DRAFTED]), self._drafts[-1])

    def finish(self, con: duckdb.DuckDBPyConnection) -> None:
        """Draw and weigh the drafts, where there are any, and end the file."""
        if self._drafts:
            drafts = [str(draft) for draft in self._drafts]
            execute(con, FINISHING[0], {**self._values, "drafts": drafts})
            for draft in drafts:
                self._keep(fetch(con, FINISHING[1], {"draft": draft}))
                Path(draft).unlink()
        self.close()

    def close(self) -> None:
        """Let the file go."""
        self._writer.close()

    @property
    def to_train_on(self) -> int:
        """Samples of users that a round learns from."""
        return self._roles.get("train", 0)

    def counts(self, likes: int) -> StageCounts:
        """What the stage holds, of ``likes`` liked pairs in the window."""
        fresh = self._samples - self._replayed
        return StageCounts(
            samples=self._samples,
            by_role=dict(sorted(self._roles.items())),
            refused={
                "no_negative": likes - self._available,
                "above_user_cap": self._available - fresh,
            },
            rows_hash=self._hash.hexdigest(),
            replayed=self._replayed,
            older=self._older,
        )

    def _keep(self, rows: pa.Table) -> None:
        samples = rows.select(self._schema.names).cast(self._schema).combine_chunks()
        self._hash.update(samples)
        self._writer.write_table(samples)
        self._samples += samples.num_rows
        self._replayed += _older(rows)
        for counted in pc.value_counts(samples.column("role")).to_pylist():
            self._roles[counted["values"]] = self._roles.get(counted["values"], 0) + counted["counts"]


def _older(rows: pa.Table) -> int:
    """How many rows are of likes from before the window."""
    return int(pc.sum(pc.less(rows.column("preferred"), 0)).as_py() or 0)
