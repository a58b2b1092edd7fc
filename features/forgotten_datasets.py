"""Forgetting in the dataset snapshots: those that hold the person's samples are written anew without them.

All that a dataset learns is per user, so what is left is, row for row, the dataset that would have been
built had the person never been there: its id is as predicted. (Weights are a stage's: they get their mean of
1 anew, which may differ from a build in the last bit. A replay's older samples stay those that were drawn.)
What became of every dataset stands in ``datasets/.forgotten.json``: policies go on naming the id they
learned from.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .errors import FeaturesError
from .forgetting import holding, without_user
from .manifest import MANIFEST, STAGES, Manifest, Stage, StageCounts, read_manifest, write_manifest
from .rows_hash import RowsHash
from .settings import FeatureSettings

NOTES = ".forgotten.json"


@dataclass(frozen=True)
class Rewritten:
    """What forgetting did to one dataset."""

    was: str
    now: str | None
    """Its id since then; None when no sample was left and it was dropped."""
    samples: int
    """Samples that went."""
    at: str


def datasets_with(datasets: Path, settings: FeatureSettings, user_id: str) -> list[str]:
    """Ids of the datasets that hold samples of ``user_id``."""
    return sorted(
        folder.name for folder in _folders(datasets) if holding(settings, folder.glob("*.parquet"), user_id)
    )


def forget_in_datasets(
    datasets: Path, settings: FeatureSettings, user_id: str, at: datetime
) -> list[Rewritten]:
    """Write every dataset with samples of ``user_id`` anew, or drop it when nothing is left.

    The note is written before the old folder goes, so that no kill loses it.
    """
    done: list[Rewritten] = []
    for was in datasets_with(datasets, settings, user_id):
        change = _rewrite(datasets / was, user_id, at)
        _note(datasets, change)
        gone = datasets / f".building-{was}-{at.timestamp():.0f}"  # no dataset any more, whole or not
        (datasets / was).rename(gone)
        shutil.rmtree(gone)
        done.append(change)
    for left in datasets.glob(".building-*"):
        if holding(settings, left.glob("*.parquet"), user_id):
            shutil.rmtree(left, ignore_errors=True)
    return done


def notes(datasets: Path) -> list[Rewritten]:
    """Every dataset that forgetting changed, oldest first."""
    file = datasets / NOTES
    if not file.exists():
        return []
    try:
        return [Rewritten(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())
        raise FeaturesError(f"{file} cannot be read ({cause}); restore it from a backup") from error


def successor(datasets: Path, dataset_id: str) -> str | None:
    """What ``dataset_id`` is called now, however often people were forgotten; None when it was dropped."""
    became = {one.was: one.now for one in notes(datasets)}
    now: str | None = dataset_id
    while now is not None and now in became and not (datasets / now / MANIFEST).exists():
        now = became[now]
    return now


def predecessors(datasets: Path, ids: set[str]) -> set[str]:
    """``ids``, and all the ids that those datasets had before."""
    known = set(ids)
    for one in reversed(notes(datasets)):
        if one.now in known:
            known.add(one.was)
    return known


def _folders(datasets: Path) -> Iterator[Path]:
    return (path.parent for path in sorted(datasets.glob(f"[!.]*/{MANIFEST}")))


def _rewrite(folder: Path, user_id: str, at: datetime) -> Rewritten:
    manifest = read_manifest(folder)
    with _staging(folder.parent) as staging:
        gone = sum(without_user(file, user_id, staging / file.name) for file in folder.glob("*.parquet"))
        for file in staging.glob("*.parquet"):
            _weigh_again(file)
        counts = {stage: _counts(staging, stage, manifest.stages[stage]) for stage in STAGES}
        if not any(stage.samples for stage in counts.values()):
            return Rewritten(folder.name, None, gone, at.isoformat())
        now = _id_of({stage: counts[stage].rows_hash for stage in STAGES})
        write_manifest(staging, _renamed(manifest, now, counts))
        for file in folder.iterdir():
            if not (staging / file.name).exists():
                shutil.copy2(file, staging / file.name)
        _publish(staging, folder.parent / now)
    return Rewritten(folder.name, now, gone, at.isoformat())


@contextmanager
def _staging(datasets: Path) -> Iterator[Path]:
    """A folder to write in under the name of one being built; gone afterwards unless renamed."""
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=datasets))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(staging: Path, path: Path) -> None:
    """Give the folder its name, unless an equal dataset has it."""
    try:
        staging.rename(path)
    except OSError:
        if not (path / MANIFEST).exists():
            raise


def _id_of(hashes: dict[Stage, str]) -> str:
    """As features.datasets names a dataset."""
    both = RowsHash(["stage", "rows_hash"])
    both.update(pa.table({"stage": list(hashes), "rows_hash": list(hashes.values())}))
    return both.hexdigest()


def _weigh_again(file: Path) -> None:
    """Weights have the mean 1 over a stage."""
    if "weight" not in pq.read_schema(file).names:
        return
    rows = pq.read_table(file)
    if rows.num_rows:
        weights = pc.divide(rows.column("weight"), pc.mean(rows.column("weight")))
        place = rows.schema.get_field_index("weight")
        pq.write_table(rows.set_column(place, rows.schema.field(place), weights), file, compression="zstd")


def _counts(folder: Path, stage: Stage, before: StageCounts) -> StageCounts:
    samples = pq.read_table(folder / f"{stage}.parquet")
    rows = RowsHash([name for name in samples.column_names if name != "sample_id"])
    rows.update(samples)
    roles = pc.value_counts(samples.column("role").combine_chunks()).to_pylist() if samples.num_rows else []
    by_role = dict(sorted((one["values"], one["counts"]) for one in roles))
    return msgspec.structs.replace(
        before, samples=samples.num_rows, by_role=by_role, rows_hash=rows.hexdigest()
    )


def _renamed(manifest: Manifest, now: str, counts: dict[Stage, StageCounts]) -> Manifest:
    warning = "people were forgotten since it was built: counts of log rows are those of that time"
    warnings = manifest.warnings if warning in manifest.warnings else [*manifest.warnings, warning]
    stages: dict[str, StageCounts] = {stage: counts[stage] for stage in STAGES}
    return msgspec.structs.replace(manifest, dataset_id=now, stages=stages, warnings=warnings)


def _note(datasets: Path, change: Rewritten) -> None:
    file, known = datasets / NOTES, notes(datasets)
    if any((one.was, one.now) == (change.was, change.now) for one in known):
        return  # by a run that was killed before the old folder went
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(one) for one in [*known, change]], indent=1) + "\n")
    temporary.replace(file)
