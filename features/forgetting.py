"""Forgetting in the feedback log: no file of any version holds a row of the person any more.

Versions that manifests name stay readable without them: a file of an old version that held their rows is
replaced by a copy that does not, beside the log (``_forgotten/files``), and ``FeedbackLog.snapshot`` reads
that. So a dataset built again at such a version is the one that would have been built had the person never
been there.

Order: the tombstone first (ingest drops their rows from its next batch on), then a commit that changes the
table's properties: Delta refuses every append that was begun before it, so no batch in flight can land
afterwards with their rows in it. Then the newest version's files are replaced in one commit (which names
files, not the person), then every other file. Each step finds by itself what is still to be done, so a
repetition finishes what a kill left. The caller holds the lock of upkeep: no compaction may run beside it.
"""

import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from .delta_files import REPLACED, files_of_versions
from .duck import connect
from .errors import FeaturesError
from .log import FeedbackLog
from .manifest import named_versions
from .settings import FeatureSettings

_log = logging.getLogger(__name__)

_STATISTICS = ("occurred_at", "arrived_at", "landed_at", "kafka_partition", "kafka_offset")
"""Columns with statistics in the log's commits (delta.dataSkippingStatsColumns): none names anybody."""
_ATTEMPTS = 20
_APPEND_ONLY = "delta.appendOnly"


@dataclass(frozen=True)
class Traces:
    """What the log holds of one person, in the files of any version."""

    files: list[Path]
    rows: int
    """Rows in the newest version."""
    first_landed: datetime | None
    items: list[str]


def traces_in_log(log: FeedbackLog, settings: FeatureSettings, user_id: str) -> Traces:
    """Look for ``user_id`` through every Parquet file in the log's folder."""
    files = _holding(settings, _every_file(log), user_id)
    newest = set(log.snapshot().files)
    rows = 0
    items: set[str] = set()
    first: datetime | None = None
    if files:
        with connect(settings) as con:
            found = con.execute(
                "select filename, count(*), min(landed_at), list(distinct item_id) "
                "from read_parquet($files, filename = true, union_by_name = true) "
                "where user_id = $user group by filename",
                {"files": [str(file) for file in files], "user": user_id},
            ).fetchall()
        for file, count, landed, theirs in found:
            rows += count if file in newest else 0
            items.update(theirs)
            first = landed if first is None else min(first, landed)
    return Traces(files, rows, first, sorted(items))


def forget_in_log(log: FeedbackLog, settings: FeatureSettings, user_id: str, datasets: Path) -> int:
    """Remove every row of ``user_id`` from every file; how many files were rewritten or deleted.

    Raises FeaturesError when the table is changed by others all the time, or a file cannot be read.
    """
    for left in Path(log.uri).rglob(".*.parquet.*.tmp"):
        left.unlink(missing_ok=True)  # of a run that was killed
    _set_append_only(log, False)
    done = _forget_in_newest(log, settings, user_id)
    _set_append_only(log, True)
    return done + _forget_in_other_files(log, settings, user_id, datasets)


def remove_days(log: FeedbackLog, before: date) -> list[Path]:
    """Take the days that landed before ``before`` out of the newest version; the files those were.

    They stay until a vacuum, and longer while a manifest names a version with them. The caller holds the
    lock of upkeep.
    """
    if not any(one["partition"]["landed_on"] < before for one in _adds(_newest(log))):
        return []
    _set_append_only(log, False)
    table = _newest(log)
    old = [one for one in _adds(table) if one["partition"]["landed_on"] < before]
    _commit(table, [_removal(one) for one in old])
    _set_append_only(log, True)
    return [Path(log.uri) / unquote(one["path"]) for one in old]


def landed_days(log: FeedbackLog) -> list[date]:
    """The days of the newest version, in order."""
    return sorted({one["partition"]["landed_on"] for one in _adds(_newest(log))})


def without_user(file: Path, user_id: str, target: Path | None = None) -> int:
    """Write ``file`` (Parquet, column user_id) less the user's rows to ``target`` (None: in its place).

    The new file is there whole or not at all. Returns how many rows went. Values are written out, never as
    the dictionaries they were read with: those would still hold the id.
    """
    target = target or file
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    gone = 0
    try:
        with pq.ParquetFile(file) as source:
            schema = _plain(source.schema_arrow)
            with pq.ParquetWriter(temporary, schema, compression="zstd") as out:
                for number in range(source.num_row_groups):
                    rows = source.read_row_group(number).cast(schema)
                    kept = rows.filter(pc.fill_null(pc.not_equal(rows.column("user_id"), user_id), True))
                    gone += rows.num_rows - kept.num_rows
                    out.write_table(kept)
        _synced(temporary)
        temporary.replace(target)
    except (OSError, pa.ArrowInvalid) as error:
        cause = " ".join(str(error).split())
        raise FeaturesError(f"{file} cannot be written anew: {cause}; run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return gone


def holding(settings: FeatureSettings, files: Iterable[Path], user_id: str) -> list[Path]:
    """Those of ``files`` (Parquet) that have a row of ``user_id``; files without such a column have none."""
    return _holding(settings, [file for file in files if _has_users(file)], user_id)


def _forget_in_newest(log: FeedbackLog, settings: FeatureSettings, user_id: str) -> int:
    done = 0
    for _ in range(_ATTEMPTS):
        table = _newest(log)
        root = Path(log.uri)
        adds = {root / unquote(one["path"]): one for one in _adds(table)}
        found = _holding(settings, list(adds), user_id)
        if not found:
            return done
        actions: list[AddAction | RemoveAction] = []
        for file in found:
            clean = file.with_name(f"part-00000-{uuid.uuid4()}-c000.zstd.parquet")
            without_user(file, user_id, clean)
            actions.append(_removal(adds[file]))
            if pq.read_metadata(clean).num_rows:
                actions.append(_addition(clean, root, adds[file]["partition"]["landed_on"]))
            else:
                clean.unlink()
        try:
            _commit(table, actions)
        except CommitFailedError as error:
            _log.warning("forget=again cause=%s", " ".join(str(error).split()))
            continue
        done += len(found)
    raise FeaturesError("the feedback log is changed by others all the time; run the same command again")


def _forget_in_other_files(log: FeedbackLog, settings: FeatureSettings, user_id: str, datasets: Path) -> int:
    """Files of older versions, of none, and earlier replacements."""
    root = Path(log.uri)
    found = _holding(settings, _every_file(log), user_id)
    if not found:
        return 0
    named = files_of_versions(log.uri, named_versions(datasets), log.storage_options)
    for file in found:
        place = file.relative_to(root)
        if place.parts[: len(REPLACED.parts)] == REPLACED.parts:
            without_user(file, user_id)
        else:
            if file in named:
                without_user(file, user_id, root / REPLACED / place)
            file.unlink(missing_ok=True)
    return len(found)


def drop_replacements(log: FeedbackLog, kept: Iterable[int]) -> int:
    """Delete replaced files that no version in ``kept`` needs any more; how many."""
    root = Path(log.uri)
    folder = root / REPLACED
    if not folder.is_dir():
        return 0
    wanted = files_of_versions(log.uri, kept, log.storage_options)
    needed = {root / REPLACED / file.relative_to(root) for file in wanted}
    over = [file for file in folder.rglob("*.parquet") if file not in needed]
    for file in over:
        file.unlink(missing_ok=True)
    return len(over)


def _every_file(log: FeedbackLog) -> list[Path]:
    """All whole Parquet files in the log's folder, those that no version has included."""
    root = Path(log.uri)
    if "://" in log.uri:
        raise FeaturesError(
            f"the feedback log at {log.uri} is not on a disk of this machine; there nobody can be forgotten"
        )
    files = [*root.glob("landed_on=*/*.parquet"), *(root / REPLACED).rglob("*.parquet")]
    return sorted(file for file in files if not file.name.startswith(".") and _has_users(file))


def _has_users(file: Path) -> bool:
    """Whether it is a whole Parquet file with user ids; what a running append writes is not whole yet."""
    try:
        return "user_id" in pq.read_schema(file).names
    except (OSError, pa.ArrowInvalid):
        return False


def _holding(settings: FeatureSettings, files: Sequence[Path], user_id: str) -> list[Path]:
    if not files:
        return []
    with connect(settings) as con:
        try:
            found = con.execute(
                "select distinct filename from read_parquet($files, filename = true, union_by_name = true) "
                "where user_id = $user",
                {"files": [str(file) for file in files], "user": user_id},
            ).fetchall()
        except duckdb.IOException:
            present = [file for file in files if file.exists()]
            if len(present) == len(files):
                raise
            return _holding(settings, present, user_id)
    return sorted(Path(file) for (file,) in found)


def _plain(schema: pa.Schema) -> pa.Schema:
    fields = (
        field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
        for field in schema
    )
    return pa.schema(list(fields))


def _newest(log: FeedbackLog) -> DeltaTable:
    return DeltaTable(log.uri, storage_options=log.storage_options)


def _adds(table: DeltaTable) -> list[dict[str, Any]]:
    adds: list[dict[str, Any]] = pa.table(table.get_add_actions()).to_pylist()
    return adds


def _set_append_only(log: FeedbackLog, wanted: bool) -> None:
    """Commit the property, whatever it was: no append that was begun before can land after."""
    _newest(log).alter.set_table_properties({_APPEND_ONLY: str(wanted).lower()})


def _removal(add: dict[str, Any]) -> RemoveAction:
    now = int(datetime.now(UTC).timestamp() * 1000)
    day = str(add["partition"]["landed_on"])
    return RemoveAction(add["path"], True, now, add["size_bytes"], {"landed_on": day})


def _addition(file: Path, root: Path, day: date) -> AddAction:
    found = file.stat()
    return AddAction(
        path=file.relative_to(root).as_posix(),
        size=found.st_size,
        partition_values={"landed_on": str(day)},
        modification_time=int(found.st_mtime * 1000),
        data_change=True,
        stats=json.dumps(_statistics(file)),
    )


def _statistics(file: Path) -> dict[str, Any]:
    names = [name for name in _STATISTICS if name in pq.read_schema(file).names]
    rows = pq.read_table(file, columns=names, partitioning=None)
    least, most, nulls = {}, {}, {}
    for name in names:
        nulls[name] = rows.column(name).null_count
        if nulls[name] < rows.num_rows:
            both = pc.min_max(rows.column(name)).as_py()
            least[name], most[name] = _stated(both["min"]), _stated(both["max"])
    return {"numRecords": rows.num_rows, "minValues": least, "maxValues": most, "nullCount": nulls}


def _stated(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return value


def _commit(table: DeltaTable, actions: Sequence[AddAction | RemoveAction]) -> None:
    table.create_write_transaction(
        list(actions),
        mode="append",
        schema=table.schema(),
        partition_by=["landed_on"],
        commit_properties=CommitProperties(max_commit_retries=100),
    )


def _synced(file: Path) -> None:
    import os

    with file.open("rb") as handle:
        os.fsync(handle)
