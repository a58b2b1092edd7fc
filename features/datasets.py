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

Options (``DatasetSettings``: own slates first, recency and propensity weights, a replay of older samples) are
queries of their own, run only where one is on: without them rows and id are what they always were.
"""

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .duck import connect
from .errors import BadInput, FeaturesError
from .events import JUDGING, MARKING, NUMBERING, READING, each_shard, number, parameters
from .log import LogSnapshot
from .manifest import FORMAT, MANIFEST, STAGES, WEIGHTED, Manifest, Stage, read_manifest, write_manifest
from .queries import execute, fetch, text_hash
from .rows_hash import RowsHash
from .settings import FeatureSettings
from .split import Role, roles_table
from .stage_rows import FINISHING, StageRows

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
WEIGHTED_SCHEMA = SAMPLE_SCHEMA.append(pa.field("weight", pa.float64()))
"""The same with ``weight`` above 0, its mean over a stage 1: where recency or propensity weighs."""

LIKING = [
    *("preference_slates", "preference_served", "preference_likes"),
    *("preference_taken", "preference_moments", "preference_engaged"),
]
SAMPLING = ["preference_negatives", "preference_slate_negatives"]
ASKING = ["preference_rejected", "histories_at_request", "preference_samples"]
QUERIES = NUMBERING + MARKING + READING + JUDGING + LIKING + SAMPLING + ASKING
OPTIONS = ["preference_preferred", "preference_positions", "preference_weights"]


_WEIGHTLESS = "create temp table weights (u integer, i integer, recency double, inverse_propensity double)"
"""Where nothing weighs."""


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
        lineage: Sequence[str] = (),
        clock: Callable[[], datetime] = _utc_now,
        progress: Callable[[int, int], None] | None = None,
    ) -> "PreferenceDataset":
        """Build both stages from ``snapshot`` into ``out_dir/<dataset_id>``; an equal dataset there is kept.

        ``gate_share`` and ``stop_share`` of the users get these roles, the rest ``train``. ``since``
        overrides the window of the settings. ``lineage``: versions of the policy that learns and of those it
        descends from, whose slates ``prefer_own_slates`` prefers. ``progress`` is told (users done, users in
        all). A build that dies leaves nothing that looks like a dataset. Raises EmptyLog, TooFewLikes,
        FeaturesError (disk).
        """
        if not snapshot.files:
            raise EmptyLog("the feedback log is empty; start align3gr ingest and send interactions first")
        if since is None and settings.dataset.window_s is not None and snapshot.watermark is not None:
            since = snapshot.watermark - timedelta(seconds=settings.dataset.window_s)
        out_dir.mkdir(parents=True, exist_ok=True)
        with _building(out_dir) as folder, connect(settings) as con:
            build = _Build(con, snapshot, settings, since, lineage, gate_share, stop_share)
            counted = build.run(folder, progress)
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
        """The samples of one stage (of one role only, when given).

        Columns as in SAMPLE_SCHEMA, or WEIGHTED_SCHEMA where the samples were weighed.
        """
        only = None if role is None else pc.field("role") == role
        try:
            table = pq.read_table(self.path / f"{stage}.parquet", filters=only)
        except (OSError, pa.ArrowInvalid) as error:
            cause = " ".join(str(error).split())
            raise FeaturesError(
                f"stage {stage} of {self.path} cannot be read: {cause}; build it again"
            ) from error
        return table.cast(WEIGHTED_SCHEMA if self.manifest.format == WEIGHTED else SAMPLE_SCHEMA)

    def verify(self) -> None:
        """Compare the stored rows with the manifest's hashes. Raises FeaturesError when they differ."""
        for stage in STAGES:
            table = self.stage(stage)
            rows = RowsHash(table.schema.names[1:])
            rows.update(table)
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
        lineage: Sequence[str],
        gate_share: float,
        stop_share: float,
    ) -> None:
        self._con, self._snapshot, self._settings, self._since = con, snapshot, settings, since
        self._shares = gate_share, stop_share
        chosen = settings.dataset
        self._lineage = list(lineage) if chosen.prefer_own_slates else []
        self._replays = chosen.replay_share > 0 and since is not None
        self._prefers = bool(self._lineage) or self._replays
        self._values = {
            **parameters(settings, snapshot.watermark),
            "cap": chosen.max_samples_per_user,
            "replay_cap": math.ceil(chosen.replay_share * chosen.max_samples_per_user),
            "replay_share": chosen.replay_share,
        }
        self._duplicates = 0
        self._likes = 0

    def run(self, folder: Path, progress: Callable[[int, int], None] | None) -> "_Build":
        self._numbered = number(self._con, self._snapshot, self._settings)
        self._con.execute(_WEIGHTLESS)
        weighs = self._settings.dataset.weighs
        self._stages: dict[Stage, StageRows] = {
            stage: StageRows(
                stage,
                folder,
                WEIGHTED_SCHEMA if weighs else SAMPLE_SCHEMA,
                self._values,
                by_draft=weighs or self._replays,
            )
            for stage in STAGES
        }
        try:
            for shard, duplicates in each_shard(self._con, self._settings, self._snapshot.watermark):
                self._duplicates += duplicates
                self._prepare(shard)
                for stage, rows in self._stages.items():
                    rows.add(self._sample(stage), self._numbered)
                if progress is not None:
                    progress(shard.stop, self._numbered.users)
            for rows in self._stages.values():
                rows.finish(self._con)
        finally:
            for rows in self._stages.values():
                rows.close()
        self._refuse_too_little()
        return self

    def manifest(self, built_at: datetime) -> Manifest:
        stages = {stage: rows.counts(self._likes) for stage, rows in self._stages.items()}
        both = RowsHash(["stage", "rows_hash"])
        both.update(
            pa.table({"stage": list(stages), "rows_hash": [counts.rows_hash for counts in stages.values()]})
        )
        settings, chosen = self._settings, self._settings.dataset
        return Manifest(
            format=WEIGHTED if chosen.weighs else FORMAT,
            dataset_id=both.hexdigest(),
            log_version=self._snapshot.version,
            watermark=self._snapshot.watermark,
            since=self._since,
            rules_hash=settings.levels.hash,
            queries_hash=text_hash(QUERIES + (OPTIONS + FINISHING if self._prefers or chosen.weighs else [])),
            settings={
                "attribution_window_s": settings.attribution_window_s,
                "history_length": settings.history_length,
                "history_look_back": settings.history_look_back,
                "max_rejected": settings.max_rejected,
                "window_s": chosen.window_s,
                "max_samples_per_user": chosen.max_samples_per_user,
                "learn_from_unsigned": chosen.learn_from_unsigned,
                "trust": settings.trust.model_dump(mode="json"),
                "prefer_own_slates": chosen.prefer_own_slates,
                "lineage": self._lineage,
                "recency_half_life_s": chosen.recency_half_life_s,
                "replay_share": chosen.replay_share,
                "propensity_clip": chosen.propensity_clip,
                "position_bias": chosen.position_bias,
                "gate_share": self._shares[0],
                "stop_share": self._shares[1],
            },
            rows=self._numbered.rows,
            users=self._numbered.users,
            unsigned=self._numbered.unsigned,
            duplicates=self._duplicates,
            likes=self._likes,
            stages={str(stage): counts for stage, counts in stages.items()},
            warnings=self._warnings(),
            built_at=built_at,
            marked=dict(self._numbered.marked),
        )

    def _prepare(self, shard: range) -> None:
        """Make the tables that both stages read, for the shard's users."""
        values = {**self._values, "since": None if self._replays else self._since}
        for name in LIKING[:3]:
            execute(self._con, name, values)
        options = OPTIONS[:1] * self._prefers + OPTIONS[1:] * self._settings.dataset.weighs
        for name in options:
            execute(self._con, name, {**self._options(), "first": shard.start, "last": shard.stop - 1})
        for name in LIKING[3:] + SAMPLING:
            execute(self._con, name, values)
        ((likes,),) = self._con.execute("select count(*) from likes where preferred > 0").fetchall()
        self._likes += likes
        users = self._con.execute(
            "select user_id from users where u between ? and ? and u in (select u from likes)",
            [shard.start, shard.stop - 1],
        ).fetchall()
        roles = roles_table((user_id for (user_id,) in users), *self._shares)
        self._con.register("roles_arrow", roles)
        self._con.execute("create or replace temp table roles as select user_id, role from roles_arrow")
        self._con.unregister("roles_arrow")

    def _options(self) -> dict[str, Any]:
        """The options as their queries name them."""
        chosen = self._settings.dataset
        half_life = chosen.recency_half_life_s
        return {
            "since": self._since,
            "watermark": self._snapshot.watermark,
            "lineage": self._lineage,
            "half_life_us": None if half_life is None else half_life * 1e6,
            "propensity_clip": chosen.propensity_clip,
            "position_bias": chosen.position_bias,
            "unsigned": chosen.learn_from_unsigned,
        }

    def _sample(self, stage: Stage) -> pa.Table:
        """The stage's samples of the shard whose tables are there; lists hold numbers."""
        values = {**self._values, "level": STAGES[stage], "stage": stage}
        for name in ASKING[:-1]:
            execute(self._con, name, values)
        return fetch(self._con, ASKING[-1], values)

    def _refuse_too_little(self) -> None:
        numbered, wanted = self._numbered, self._settings.dataset.min_samples
        marked = sum(numbered.marked.values())
        if numbered.rows == numbered.unsigned + marked:
            raise EmptyLog(
                f"the feedback log holds nothing to learn from ({numbered.unsigned} rows under"
                f" unsigned request ids, {marked} marked as forged: align3gr quality marked);"
                " send interactions, or give server and ingest the same request_key"
            )
        found = sum(rows.to_train_on for rows in self._stages.values())
        if found < wanted:
            raise TooFewLikes(
                f"too few likes: {self._likes} liked items give {found} samples to train on,"
                f" {wanted} are wanted; wait for more feedback or lower features.dataset.min_samples"
            )

    def _warnings(self) -> list[str]:
        learned = self._numbered.rows - self._numbered.unsigned - sum(self._numbered.marked.values())
        share = self._duplicates / max(learned, 1)
        if share <= self._settings.dataset.duplicates_warning:
            return []
        return [f"duplicates={self._duplicates} share={share:.4f}: does a client send a constant event_id?"]


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
