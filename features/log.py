"""The feedback log: an append-only Delta table whose commits carry the Kafka offsets they hold.

Table and offsets move together: an append names, for each partition, the last offset in it as a Delta app
transaction. The check is compare-and-set against this handle's snapshot. Every successful append moves the
handle past other workers' commits too, so the handle also remembers what *it* last read or wrote for each
partition and refuses when the table says otherwise: a worker that lost a partition cannot append to it.

Protocol: ``open`` (or ``refresh``), ``transaction_version`` of each partition, seek behind it, ``append``
with the same handle; on LogConflict drop the batch and start again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from .delta_files import files_of, replaced
from .errors import BadInput, FeaturesError
from .space import require_space
from .transactions import TransactionReader

LOG_SCHEMA = pa.schema(
    [
        pa.field("event_id", pa.string()),
        pa.field("user_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("occurred_at", pa.timestamp("us", "UTC")),
        pa.field("level", pa.int8()),
        pa.field("rules", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("policy_version", pa.string()),
        pa.field("propensity", pa.float64()),
        pa.field("value", pa.float64()),
        pa.field("text", pa.string()),
        pa.field("source", pa.string()),
        pa.field("schema_version", pa.string()),
        pa.field("extra", pa.string()),
        pa.field("signed", pa.bool_()),
        pa.field("arrived_at", pa.timestamp("us", "UTC")),
        pa.field("landed_at", pa.timestamp("us", "UTC")),
        pa.field("landed_on", pa.date32()),
        pa.field("kafka_partition", pa.int32()),
        pa.field("kafka_offset", pa.int64()),
    ]
)
"""Columns of the log. ``level``: int8 or null; ``rules``: hash of the level rules; ``extra``: JSON of unknown
fields or null; ``signed``: null without request_id or key; ``arrived_at``: Kafka's record timestamp;
``landed_at``: the worker's clock at the commit; ``landed_on`` is the partition column."""

COMMITS_KEPT_DAYS = 30
"""Days for which every version can be opened; longer while a manifest names an older one."""

WATERMARK = "#watermark"
PARTITIONS = "#partitions"


class LogConflict(FeaturesError):  # noqa: N818 - reads as what it is
    """The table holds something else than this handle last read: drop the batch, reopen, read, seek."""


class LogUnwritable(FeaturesError):  # noqa: N818
    """The store refused the write (disk full, no rights, object store away); the table is as it was."""


class LogMissing(FeaturesError, BadInput):  # noqa: N818
    """There is no feedback log where one was expected."""


class LogMismatch(FeaturesError, BadInput):  # noqa: N818
    """The table at this place is not a feedback log that this version can read."""


def offsets_app(cluster: str, topic: str, partition: int) -> str:
    """App id whose version is the last landed offset of the partition."""
    return f"{cluster}/{topic}/{partition}"


def watermark_app(cluster: str, topic: str, partition: int) -> str:
    """App id whose version is the partition's watermark: epoch milliseconds up to which all has landed."""
    return offsets_app(cluster, topic, partition) + WATERMARK


def partitions_app(cluster: str, topic: str) -> str:
    """App id whose version is the topic's number of partitions: the watermark waits for all of them."""
    return f"{cluster}/{topic}{PARTITIONS}"


@dataclass(frozen=True)
class LogSnapshot:
    """One version of the log, pinned: its files, and up to when it is complete."""

    version: int
    files: list[str]
    """Parquet files of exactly this version; read with ``features.duck.view_of``."""
    watermark: datetime | None
    """Least watermark over the topic's partitions; None while one of them has none."""
    schema: pa.Schema
    storage_options: dict[str, str] | None = None


class FeedbackLog:
    """One handle on the log. Not shared between threads; open one each."""

    def __init__(self, uri: str, table: DeltaTable, storage_options: dict[str, str] | None = None) -> None:
        self._uri = uri
        self._table = table
        self._storage_options = storage_options
        self._claimed: dict[str, int | None] = {}
        self._transactions = TransactionReader(table)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        create: bool = True,
        storage_options: dict[str, str] | None = None,
        checkpoint_interval: int = 50,
    ) -> "FeedbackLog":
        """Open the log at ``path`` (a folder or an object store's URI), made when missing and ``create``.

        Raises LogMissing when it is missing and ``create`` is false, LogMismatch when a table is there whose
        columns are not the log's.
        """
        uri = str(path) if "://" in str(path) else str(Path(path).absolute())
        try:
            table = DeltaTable(uri, storage_options=storage_options)
        except TableNotFoundError:
            if not create:
                raise LogMissing(
                    f"no feedback log at {uri}; start align3gr ingest, or check the setting home"
                ) from None
            if "://" not in uri:
                Path(uri).mkdir(parents=True, exist_ok=True)
            table = DeltaTable.create(
                uri,
                LOG_SCHEMA,
                mode="ignore",  # two workers may start at once: the second finds the first one's table
                partition_by=["landed_on"],
                name="feedback",
                storage_options=storage_options,
                configuration={
                    "delta.appendOnly": "true",
                    "delta.checkpointInterval": str(checkpoint_interval),
                    # Dataset manifests name versions: only upkeep, which knows them, removes old commits.
                    "delta.enableExpiredLogCleanup": "false",
                    "delta.logRetentionDuration": f"interval {COMMITS_KEPT_DAYS} days",
                    "delta.dataSkippingStatsColumns": "occurred_at,arrived_at,landed_at,"
                    "kafka_partition,kafka_offset",
                },
            )
            table = DeltaTable(uri, storage_options=storage_options)
        _require_columns(uri, table)
        return cls(uri, table, storage_options)

    @property
    def version(self) -> int:
        """Version of the table that this handle sees."""
        return self._table.version()

    @property
    def uri(self) -> str:
        """Where the log lives: an absolute path, or the object store's URI."""
        return self._uri

    @property
    def storage_options(self) -> dict[str, str] | None:
        """How the object store is reached; None for a local folder."""
        return self._storage_options

    @property
    def table(self) -> DeltaTable:
        """The Delta table behind this handle, for upkeep; append only through the log."""
        return self._table

    def refresh(self) -> None:
        """See the newest version. Forgets what was read: transaction versions must be read again."""
        self._claimed.clear()
        self._table.update_incremental()

    def transaction_version(self, app_id: str) -> int | None:
        """Last version committed for ``app_id`` as of this handle; from now on ``append`` holds you to it.

        Reading a partition's offsets claims its watermark too.
        """
        for claimed in (app_id, app_id + WATERMARK):
            self._claimed[claimed] = self._table.transaction_version(claimed)
        return self._claimed[app_id]

    def append(self, table: pa.Table, transactions: Mapping[str, int]) -> int:
        """Commit ``table`` (LOG_SCHEMA; may be empty) and ``transactions`` as one; returns the new version.

        Raises LogConflict, and writes nothing, when one of the app ids was not read through this handle, has
        been moved by somebody else since, or would move backwards. Raises LogUnwritable when the store cannot
        take it. After either, every transaction version must be read again, from a refreshed handle.
        """
        if table.schema != LOG_SCHEMA:
            table = table.select(LOG_SCHEMA.names).cast(LOG_SCHEMA)
        for app_id, wanted in transactions.items():
            self._require(app_id, wanted)
        if not table.num_rows and not transactions:
            return self.version
        try:
            require_space(self._uri, table.nbytes)
            write_deltalake(
                self._table,
                table,
                mode="append",
                commit_properties=CommitProperties(
                    app_transactions=[Transaction(app_id, wanted) for app_id, wanted in transactions.items()]
                ),
            )
        except CommitFailedError as error:
            self._claimed.clear()
            raise LogConflict(f"another writer was first ({_one_line(error)}); reopen the log") from error
        except (DeltaError, OSError) as error:
            self._claimed.clear()
            raise LogUnwritable(
                f"the feedback log at {self.uri} cannot be written ({_one_line(error)}); "
                "check the disk's space and rights, then start again: nothing was lost"
            ) from error
        self._claimed.update(transactions)
        return self.version

    def snapshot(self, version: int | None = None) -> LogSnapshot:
        """The newest version, or the one named; the handle itself does not move.

        Raises FeaturesError when ``version`` does not exist or is not readable any more.
        """
        table = DeltaTable(self.uri, storage_options=self._storage_options)
        newest = table.version()
        if version is not None and version != newest:
            if not 0 <= version < newest:
                raise FeaturesError(f"the feedback log has no version {version}; the newest is {newest}")
            try:
                table.load_as_version(version)
            except DeltaError as error:
                raise FeaturesError(
                    f"version {version} of the feedback log cannot be read any more ({_one_line(error)}); "
                    f"name one of the last {COMMITS_KEPT_DAYS} days"
                ) from error
        return LogSnapshot(
            version=table.version(),
            files=replaced(self._uri, files_of(table)),
            watermark=watermark_of(self._transactions.at(table)),
            schema=LOG_SCHEMA,
            storage_options=self._storage_options,
        )

    def _require(self, app_id: str, wanted: int) -> None:
        if app_id not in self._claimed:
            raise LogConflict(
                f"{app_id} was not read through this handle; read its transaction_version first"
            )
        mine, tables = self._claimed[app_id], self._table.transaction_version(app_id)
        if mine != tables:
            raise LogConflict(f"{app_id} is at {tables}, this writer last saw {mine}; reopen the log")
        if tables is not None and wanted < tables:
            raise LogConflict(f"{app_id} would move backwards from {tables} to {wanted}; reopen the log")


def _require_columns(uri: str, table: DeltaTable) -> None:
    """A table with more columns (of a later minor version) is fine; one that lacks ours is not."""
    columns = {field.name for field in table.schema().fields}
    lacking = [name for name in LOG_SCHEMA.names if name not in columns]
    if lacking:
        raise LogMismatch(
            f"the table at {uri} has no column {lacking[0]}: it is not a feedback log of this version; "
            "name another home, or upgrade align3gr"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def watermark_of(transactions: Mapping[str, int]) -> datetime | None:
    """Least watermark over the partitions of the topic, from all app transactions of a version.

    A log is fed by one cluster at a time. When a topic was recreated or its broker replaced, the generation
    with the latest watermark counts: nothing more can land from an earlier one. None while a partition that
    is known (by landed offsets, or by the topic's number of partitions) has no watermark yet.
    """
    generations: dict[str, dict[str, int | None]] = {}
    for app_id, at in transactions.items():
        if app_id.endswith(PARTITIONS):
            topic = app_id.removesuffix(PARTITIONS)
            for number in range(at):
                generations.setdefault(topic, {}).setdefault(str(number), None)
            continue
        topic, _, partition = app_id.removesuffix(WATERMARK).rpartition("/")
        marks = generations.setdefault(topic, {})
        if app_id.endswith(WATERMARK):
            marks[partition] = at
        else:
            marks.setdefault(partition, None)
    current: dict[str, tuple[int, dict[str, int | None]]] = {}
    for generation, marks in generations.items():
        topic = generation.rpartition("/")[2]
        latest = max((mark for mark in marks.values() if mark is not None), default=-1)
        if topic not in current or latest > current[topic][0]:
            current[topic] = (latest, marks)
    every = [mark for _, marks in current.values() for mark in marks.values()]
    known = [mark for mark in every if mark is not None]
    if not known or len(known) < len(every):
        return None
    return datetime.fromtimestamp(min(known) / 1000, UTC)
