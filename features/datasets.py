"""Preference datasets: immutable snapshots of what users preferred, one sample a liked item, by two clocks.

The prompt is what was known when the slate was asked for; the levels are those in force at the dataset's
cutoff. So an item that turns out neutral after the like is still rejected, and the click that led to a like
never stands in its prompt. ``preference_*.sql`` and ``histories_at_request.sql`` tell each step.

Readings of what design.md leaves open:

- A like belongs to the request it names; without one, to that of the user's last impression of the item
  within the attribution window before it.
- ``asked_at`` is the slate's first served record (the prompt is the same for all its items), also for what
  had landed: only events that landed before it are in the history. Where the item is on no known slate,
  ``asked_at`` is the user's first event on the item and the second clock does not apply.
- Landing order is (landed_at, partition, offset): within a partition that is the order of offsets, and it
  holds when a new topic starts again at offset zero.
- The window is about arrival: likes that arrived after ``since`` (Kafka's time, against the watermark).
- Slate negatives are ordered like the others: the latest decided first.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .duck import connect
from .errors import BadInput, FeaturesError
from .events import JUDGING, NUMBERING, READING, Numbered, each_shard, number, parameters
from .log import LogSnapshot
from .manifest import FORMAT, MANIFEST, STAGES, Manifest, Stage, StageCounts, read_manifest, write_manifest
from .queries import execute, fetch, text_hash
from .rows_hash import RowsHash
from .settings import FeatureSettings
from .split import Role, roles_table

log = logging.getLogger(__name__)

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("user_id", pa.string()),
        pa.field("history", pa.list_(pa.string())),
        pa.field("chosen", pa.string()),
        pa.field("rejected", pa.list_(pa.string())),
        pa.field("asked_at", pa.timestamp("us", "UTC")),
        pa.field("request_id", pa.string()),
        pa.field("policy_version", pa.string()),
        pa.field("propensity", pa.float64()),
        pa.field("role", pa.string()),
    ]
)
"""One preference sample a row, sorted by ``user_id, chosen``, which is unique in a stage. ``history``: oldest
first, may be empty; ``rejected``: 1 to 20 items, those of the same slate first; ``request_id``,
``policy_version``, ``propensity``: null where there is none; ``role``: train, stop or gate."""

LIKING = [
    *("preference_slates", "preference_served", "preference_likes"),
    *("preference_taken", "preference_moments", "preference_engaged"),
]
SAMPLING = ["preference_negatives", "preference_slate_negatives"]
ASKING = ["preference_rejected", "histories_at_request", "preference_samples"]
QUERIES = NUMBERING + READING + JUDGING + LIKING + SAMPLING + ASKING

_HASHED = SAMPLE_SCHEMA.names[1:]


def _utc_now() -> datetime:
    return datetime.now(UTC)


class EmptyLog(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """The log holds nothing that could be learned from."""


class TooFewLikes(FeaturesError, BadInput):  # noqa: N818
    """Too few samples to train on."""


@dataclass(frozen=True)
class PreferenceDataset:
    """A finished dataset in its folder: ``manifest.json``, ``easy.parquet``, ``hard.parquet``."""

    path: Path
    manifest: Manifest

    @property
    def dataset_id(self) -> str:
        """Hash over the logical rows of both stages."""
        return self.manifest.dataset_id

    @classmethod
    def build(
        cls,
        snapshot: LogSnapshot,
        settings: FeatureSettings,
        out_dir: Path,
        *,
        gate_share: float = 0.0,
        stop_share: float = 0.0,
        since: datetime | None = None,
        clock: Callable[[], datetime] = _utc_now,
        progress: Callable[[int, int], None] | None = None,
    ) -> "PreferenceDataset":
        """Build both stages from ``snapshot`` into ``out_dir/<dataset_id>``; an equal dataset there is kept.

        ``gate_share`` and ``stop_share`` of the users get these roles, the rest ``train``. ``since``
        overrides the window of the settings. ``progress`` is told (users done, users in all). A build
        that dies leaves nothing that looks like a dataset. Raises EmptyLog, TooFewLikes,
        FeaturesError (disk).
        """
        if not snapshot.files:
            raise EmptyLog("the feedback log is empty; start align3gr ingest and send interactions first")
        if since is None and settings.dataset.window_s is not None and snapshot.watermark is not None:
            since = snapshot.watermark - timedelta(seconds=settings.dataset.window_s)
        out_dir.mkdir(parents=True, exist_ok=True)
        with _building(out_dir) as folder, connect(settings) as con:
            counted = _Build(con, snapshot, settings, since, gate_share, stop_share).run(folder, progress)
            manifest = counted.manifest(clock())
            write_manifest(folder, manifest)
            path = _publish(folder, out_dir / manifest.dataset_id)
        dataset = cls.open(path)
        log.info(
            "dataset built id=%s log_version=%d likes=%d easy=%d hard=%d duplicates=%d unsigned=%d",
            dataset.dataset_id,
            snapshot.version,
            manifest.likes,
            manifest.stages["easy"].samples,
            manifest.stages["hard"].samples,
            manifest.duplicates,
            manifest.unsigned,
        )
        for warning in manifest.warnings:
            log.warning("dataset id=%s %s", dataset.dataset_id, warning)
        return dataset

    @classmethod
    def open(cls, path: Path) -> "PreferenceDataset":
        """The finished dataset in folder ``path``. Raises DatasetMissing when there is none."""
        return cls(path, read_manifest(path))

    def stage(self, stage: Stage, role: Role | None = None) -> pa.Table:
        """The samples of one stage (of one role only, when given). Columns as in SAMPLE_SCHEMA."""
        only = None if role is None else pc.field("role") == role
        try:
            table = pq.read_table(self.path / f"{stage}.parquet", filters=only)
        except (OSError, pa.ArrowInvalid) as error:
            cause = " ".join(str(error).split())
            raise FeaturesError(
                f"stage {stage} of {self.path} cannot be read: {cause}; build it again"
            ) from error
        return table.cast(SAMPLE_SCHEMA)

    def verify(self) -> None:
        """Compare the stored rows with the manifest's hashes. Raises FeaturesError when they differ."""
        for stage in STAGES:
            rows = RowsHash(_HASHED)
            rows.update(self.stage(stage))
            if rows.hexdigest() != self.manifest.stages[stage].rows_hash:
                raise FeaturesError(
                    f"stage {stage} of {self.path} is not what its manifest says; build it again"
                )


class _Build:
    """One build: shard after shard into two Parquet files, counting as it goes."""

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        snapshot: LogSnapshot,
        settings: FeatureSettings,
        since: datetime | None,
        gate_share: float,
        stop_share: float,
    ) -> None:
        self._con, self._snapshot, self._settings, self._since = con, snapshot, settings, since
        self._shares = gate_share, stop_share
        self._values = {
            **parameters(settings, snapshot.watermark),
            "since": since,
            "cap": settings.dataset.max_samples_per_user,
        }
        self._hashes = {stage: RowsHash(_HASHED) for stage in STAGES}
        self._available = dict.fromkeys(STAGES, 0)
        self._samples = dict.fromkeys(STAGES, 0)
        self._roles: dict[Stage, dict[str, int]] = {stage: {} for stage in STAGES}
        self._duplicates = 0
        self._likes = 0

    def run(self, folder: Path, progress: Callable[[int, int], None] | None) -> "_Build":
        self._numbered = number(self._con, self._snapshot, self._settings)
        writers = {
            stage: pq.ParquetWriter(folder / f"{stage}.parquet", SAMPLE_SCHEMA, compression="zstd")
            for stage in STAGES
        }
        try:
            for shard, duplicates in each_shard(self._con, self._settings, self._snapshot.watermark):
                self._duplicates += duplicates
                self._prepare(shard)
                for stage in STAGES:
                    writers[stage].write_table(self._sample(stage))
                if progress is not None:
                    progress(shard.stop, self._numbered.users)
        finally:
            for writer in writers.values():
                writer.close()
        self._refuse_too_little()
        return self

    def manifest(self, built_at: datetime) -> Manifest:
        hashes = {stage: rows.hexdigest() for stage, rows in self._hashes.items()}
        both = RowsHash(["stage", "rows_hash"])
        both.update(pa.table({"stage": list(hashes), "rows_hash": list(hashes.values())}))
        settings = self._settings
        return Manifest(
            format=FORMAT,
            dataset_id=both.hexdigest(),
            log_version=self._snapshot.version,
            watermark=self._snapshot.watermark,
            since=self._since,
            rules_hash=settings.levels.hash,
            queries_hash=text_hash(QUERIES),
            settings={
                "attribution_window_s": settings.attribution_window_s,
                "history_length": settings.history_length,
                "history_look_back": settings.history_look_back,
                "max_rejected": settings.max_rejected,
                "window_s": settings.dataset.window_s,
                "max_samples_per_user": settings.dataset.max_samples_per_user,
                "learn_from_unsigned": settings.dataset.learn_from_unsigned,
                "gate_share": self._shares[0],
                "stop_share": self._shares[1],
            },
            rows=self._numbered.rows,
            users=self._numbered.users,
            unsigned=self._numbered.unsigned,
            duplicates=self._duplicates,
            likes=self._likes,
            stages={
                stage: StageCounts(
                    samples=self._samples[stage],
                    by_role=dict(sorted(self._roles[stage].items())),
                    refused={
                        "no_negative": self._likes - self._available[stage],
                        "above_user_cap": self._available[stage] - self._samples[stage],
                    },
                    rows_hash=hashes[stage],
                )
                for stage in STAGES
            },
            warnings=self._warnings(),
            built_at=built_at,
        )

    def _prepare(self, shard: range) -> None:
        """Make the tables that both stages read, for the shard's users."""
        for name in LIKING + SAMPLING:
            execute(self._con, name, self._values)
        ((likes,),) = self._con.execute("select count(*) from likes").fetchall()
        self._likes += likes
        users = self._con.execute(
            "select user_id from users where u between ? and ? and u in (select u from likes)",
            [shard.start, shard.stop - 1],
        ).fetchall()
        roles = roles_table((user_id for (user_id,) in users), *self._shares)
        self._con.register("roles_arrow", roles)
        self._con.execute("create or replace temp table roles as select user_id, role from roles_arrow")
        self._con.unregister("roles_arrow")

    def _sample(self, stage: Stage) -> pa.Table:
        """The stage's samples of the shard whose tables are there, with names for numbers."""
        values = {**self._values, "level": STAGES[stage], "stage": stage}
        for name in ASKING[:-1]:
            execute(self._con, name, values)
        found = fetch(self._con, ASKING[-1], values)
        self._available[stage] += (
            pc.sum(found.filter(found.column("last_of_user")).column("available")).as_py() or 0
        )
        samples = _named(found, self._numbered).combine_chunks()
        self._hashes[stage].update(samples)
        self._samples[stage] += samples.num_rows
        for counted in pc.value_counts(samples.column("role")).to_pylist():
            roles = self._roles[stage]
            roles[counted["values"]] = roles.get(counted["values"], 0) + counted["counts"]
        return samples

    def _refuse_too_little(self) -> None:
        numbered, wanted = self._numbered, self._settings.dataset.min_samples
        if numbered.rows == numbered.unsigned:
            raise EmptyLog(
                f"the feedback log holds nothing to learn from ({numbered.unsigned} rows under"
                " unsigned request ids); send interactions, or give server and ingest the same request_key"
            )
        found = sum(roles.get("train", 0) for roles in self._roles.values())
        if found < wanted:
            raise TooFewLikes(
                f"too few likes: {self._likes} liked items give {found} samples to train on,"
                f" {wanted} are wanted; wait for more feedback or lower features.dataset.min_samples"
            )

    def _warnings(self) -> list[str]:
        learned = self._numbered.rows - self._numbered.unsigned
        share = self._duplicates / max(learned, 1)
        if share <= self._settings.dataset.duplicates_warning:
            return []
        return [f"duplicates={self._duplicates} share={share:.4f}: does a client send a constant event_id?"]


def _named(found: pa.Table, numbered: Numbered) -> pa.Table:
    for name in ("history", "rejected"):
        place = found.schema.get_field_index(name)
        found = found.set_column(place, name, numbered.items(found.column(name)))
    return found.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)


@contextmanager
def _building(out_dir: Path) -> Iterator[Path]:
    """A folder to build in, gone afterwards unless renamed; a full disk is one line."""
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=out_dir))
    folder.chmod(0o755)  # other processes read what the round's process builds
    _sweep(out_dir, folder)
    try:
        yield folder
    except (OSError, duckdb.IOException, duckdb.OutOfMemoryException) as error:
        cause = " ".join(str(error).split())
        raise FeaturesError(
            f"the dataset cannot be built: {cause}; free disk space or memory, then start again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(out_dir: Path, newest: Path) -> None:
    """Remove what builds that died left behind more than a day ago."""
    now = newest.stat().st_mtime
    for left in out_dir.glob(".building-*"):
        if now - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)


def _publish(folder: Path, path: Path) -> Path:
    """Give the finished folder its name, unless an equal dataset has it already."""
    for file in folder.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    try:
        folder.rename(path)
    except OSError:
        if not (path / MANIFEST).exists():
            raise
        log.info("dataset exists id=%s", path.name)
    return path
