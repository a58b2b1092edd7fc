"""Self-play: the policy recommends on training histories, and what it put beside the target becomes a stage.

One target of one user gives one sample a grade: history = the items in front of it, chosen = the target,
rejected = the policy's own candidates of that grade (``grading``). Targets come from training histories
alone: the last ``leave_out`` items of a user are read by nothing here, neither as target nor to spare an
item from being rejected, for that would tell the policy what is to be found.

Candidates are drawn in parts that lie on disk as they are made, so a killed run goes on where it was; a
part depends on nothing but policy, targets, settings and seed, so it ends as an uninterrupted one would
have. A finished run is a folder named by all that determines it::

    manifest.json       policy, settings, seed, counts, what was refused and why
    sp-easy.parquet     sp-medium.parquet     sp-hard.parquet
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.datasets import SAMPLE_SCHEMA
from features.errors import BadInput
from features.rows_hash import RowsHash
from policies.policy import Policy, UserContext
from trainer.errors import TrainerError
from trainer.round_state import write_json
from trainer.settings import SelfPlaySettings

from .grading import GRADES, Grader, IntArray
from .targets import Targets, targets_of

log = logging.getLogger(__name__)

SelfPlayStage = Literal["sp-easy", "sp-medium", "sp-hard"]
STAGES: tuple[SelfPlayStage, ...] = ("sp-easy", "sp-medium", "sp-hard")
"""The stage of each grade, in the order of grading.GRADES."""

FORMAT = 1
MANIFEST = "manifest.json"
PART = 1024
"""Targets between two parts on disk."""

PLAYED_SCHEMA = pa.schema(
    [SAMPLE_SCHEMA.field(name) for name in ("sample_id", "user_id", "history", "chosen", "rejected")]
)
"""One sample a row: what of SAMPLE_SCHEMA a stage reads. Rows are in the order of users and targets;
``sample_id`` is ``user@place of the target`` and is the same in every grade."""

Progress = Callable[[int, int], None]
"""Told (targets done, targets in all)."""


class NothingToPlay(TrainerError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """No training history holds a target."""


@dataclass(frozen=True)
class SelfPlay:
    """A finished run in its folder."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def selfplay_id(self) -> str:
        """Name of the folder: a hash of all that determines it."""
        return self.path.name

    @classmethod
    def open(cls, path: Path) -> "SelfPlay":
        """Raises BadInput when there is no finished run."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{path} holds no finished self-play ({' '.join(str(error).split())}): run "
                "`align3gr selfplay`"
            ) from error
        return cls(path, manifest)

    def stage(self, stage: SelfPlayStage) -> pa.Table:
        """The samples of one grade. Columns as in PLAYED_SCHEMA."""
        try:
            return pq.read_table(self.path / f"{stage}.parquet").cast(PLAYED_SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            cause = " ".join(str(error).split())
            raise TrainerError(
                f"{stage} of {self.path} cannot be read: {cause}; remove the folder and play again"
            ) from error


def play(
    policy: Policy,
    histories: Mapping[str, Sequence[str]],
    settings: SelfPlaySettings,
    out_dir: Path,
    *,
    seed: int,
    leave_out: int,
    clock: Callable[[], datetime],
    progress: Progress | None = None,
) -> SelfPlay:
    """Let ``policy`` recommend on every target of ``histories`` (user -> items, oldest first) and grade that.

    The result is ``out_dir/<id>``; one that is there is taken as it is, an unfinished one is continued.
    ``leave_out``: last items of each history that nothing here reads. Raises NothingToPlay, NoCodeVectors.
    """
    targets = targets_of(policy, histories, settings, leave_out=leave_out)
    if not len(targets):
        raise NothingToPlay(
            f"no history holds a target to play: besides the last {leave_out} items of a user, which are "
            f"left out, it needs two that have an SCID ({_words(targets.refused)})"
        )
    grader = Grader.of(policy.codec, policy.trie, settings)
    facts = {
        "format": FORMAT,
        "policy": {"version": policy.version, "sha256": policy_hash(policy)},
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "leave_out": leave_out,
        "device": policy.device.type,
        "targets_sha256": targets.digest(),
    }
    # The version is a name: a policy that a registry has numbered since plays the same.
    decides = {**facts, "policy": policy_hash(policy)}
    name = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    folder = out_dir / name
    if (folder / MANIFEST).is_file():
        log.info("selfplay exists id=%s", name)
        return SelfPlay.open(folder)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    _draw(policy, targets, settings, parts, seed, progress)
    grades = _grade(policy, grader, targets, settings, folder, seed)
    manifest = {
        **facts,
        "users": len(set(targets.users)),
        "targets": len(targets),
        "refused": targets.refused,
        "stages": grades,
        "built_at": clock().isoformat(),
    }
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(parts)
    log.info("selfplay done id=%s targets=%d", name, len(targets))
    return SelfPlay(folder, manifest)


def policy_hash(policy: Policy) -> str:
    """Hash of what a policy's lists depend on: its weights (and its base's) and the codec in force."""
    base = policy.base.sha256 if policy.manifest.kind == "adapter" and policy.base is not None else None
    weights = {
        name: digest
        for name, digest in sorted(policy.manifest.files.items())
        if name.endswith((".safetensors", "tokenizer.json")) and not name.startswith("codec/")
    }
    facts = [base, weights, policy.codec.quantizer_hash, policy.codec.item_map_hash]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _draw(
    policy: Policy,
    targets: Targets,
    settings: SelfPlaySettings,
    parts: Path,
    seed: int,
    progress: Progress | None,
) -> None:
    """Write those of the parts that are not there yet."""
    for number, start in enumerate(range(0, len(targets), PART)):
        part, file = targets.part(start, PART), parts / f"{number:05d}.parquet"
        if not file.is_file():
            drawn = _candidates(policy, part, settings, seed, progress, start, len(targets))
            _write(pa.table({"candidates": pa.FixedSizeListArray.from_arrays(*drawn)}), file)
        elif progress is not None:
            progress(start + len(part), len(targets))


def _candidates(
    policy: Policy,
    part: Targets,
    settings: SelfPlaySettings,
    seed: int,
    progress: Progress | None,
    start: int,
    total: int,
) -> tuple[pa.Array, int]:
    """Codec rows [len(part) * width] of what the policy draws for each target, best first, -1 fills."""
    rows = policy.codec.items
    found = np.full((len(part), settings.width), -1, dtype=np.int32)
    order = sorted(range(len(part)), key=lambda place: len(part.histories[place]))
    size = 4 * policy.settings.batch
    for begin in range(0, len(order), size):
        places = order[begin : begin + size]
        # A user may have several targets: each is a request of its own.
        asked = [
            UserContext(f"{part.users[at]}@{part.places[at]}", part.histories[at], part.seen[at])
            for at in places
        ]
        if settings.candidates == "beam":
            lists = policy.recommend(asked, settings.width, beam=settings.width)
        else:
            lists = policy.sample(asked, settings.width, seed=seed, temperature=settings.temperature)
        for at, listed in zip(places, lists, strict=True):
            found[at, : len(listed)] = [rows[one.item_id] for one in listed]
        if progress is not None:
            progress(start + min(begin + size, len(order)), total)
    return pa.array(found.reshape(-1)), settings.width


def _grade(
    policy: Policy,
    grader: Grader,
    targets: Targets,
    settings: SelfPlaySettings,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Write the grades' tables from the parts; the counts of each."""
    writers = {
        stage: pq.ParquetWriter(folder / f".{stage}.partial", PLAYED_SCHEMA, compression="zstd")
        for stage in STAGES
    }
    counts = {stage: _Counts(RowsHash(PLAYED_SCHEMA.names)) for stage in STAGES}
    try:
        for number, start in enumerate(range(0, len(targets), PART)):
            part = targets.part(start, PART)
            drawn = _read_part(folder / "parts" / f"{number:05d}.parquet", settings.width)
            rows = policy.codec.items
            chosen = np.array([rows[item] for item in part.chosen], dtype=np.int64)
            seen = _padded([[rows[item] for item in items if item in rows] for items in part.seen])
            for level, (grade, stage) in enumerate(zip(GRADES, STAGES, strict=True)):
                random = np.random.default_rng([seed, number, level])
                rejected, added = grader.rejected(grade, chosen, drawn, seen, random)
                counts[stage].add(rejected, added)
                writers[stage].write_table(_table(policy, part, rejected))
    finally:
        for writer in writers.values():
            writer.close()
    for stage in STAGES:
        partial = folder / f".{stage}.partial"
        table = _thinned(pq.read_table(partial), settings.samples, seed)
        if table.num_rows < counts[stage].samples:
            counts[stage].above = counts[stage].samples - table.num_rows
        counts[stage].hash.update(table)
        _write(table, folder / f"{stage}.parquet")
        partial.unlink()
    return {stage: one.as_dict() for stage, one in counts.items()}


@dataclass
class _Counts:
    """What a grade came to."""

    hash: RowsHash
    samples: int = 0
    without: int = 0
    rejected: int = 0
    added: int = 0
    above: int = 0

    def add(self, rejected: IntArray, added: IntArray) -> None:
        there = (rejected >= 0).sum(axis=1)
        self.samples += int((there > 0).sum())
        self.without += int((there == 0).sum())
        self.rejected += int(there.sum())
        self.added += int(added.sum())

    def as_dict(self) -> dict[str, Any]:
        """For the manifest. ``rejected_mean`` and ``added_share`` are over all samples there were."""
        return {
            "samples": self.samples - self.above,
            "rejected_mean": round(self.rejected / max(self.samples, 1), 3),
            "added_share": round(self.added / max(self.rejected, 1), 4),
            "refused": {"no item of this grade": self.without, "above the limit of samples": self.above},
            "rows_hash": self.hash.hexdigest(),
        }


def _table(policy: Policy, part: Targets, rejected: IntArray) -> pa.Table:
    """The samples of a part that have a rejected item."""
    counts = (rejected >= 0).sum(axis=1)
    kept = np.flatnonzero(counts)
    names = pa.array(policy.codec.item_ids, pa.string())
    items = names.take(pa.array(rejected[kept][rejected[kept] >= 0]))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts[kept])]).astype(np.int32))
    columns = [
        pa.array([f"{part.users[at]}@{part.places[at]}" for at in kept], pa.string()),
        pa.array([part.users[at] for at in kept], pa.string()),
        pa.array([part.histories[at] for at in kept], pa.list_(pa.string())),
        pa.array([part.chosen[at] for at in kept], pa.string()),
        pa.ListArray.from_arrays(offsets, items),
    ]
    return pa.Table.from_arrays(columns, schema=PLAYED_SCHEMA)


def _thinned(table: pa.Table, most: int | None, seed: int) -> pa.Table:
    """At most ``most`` rows, drawn by the seed, in their order."""
    if most is None or table.num_rows <= most:
        return table
    drawn = np.random.default_rng([seed, most]).permutation(table.num_rows)[:most]
    return table.take(pa.array(np.sort(drawn)))


def _read_part(file: Path, width: int) -> IntArray:
    column = pq.read_table(file).column("candidates").combine_chunks()
    drawn: IntArray = column.flatten().to_numpy().reshape(-1, width).astype(np.int64)
    return drawn


def _write(table: pa.Table, file: Path) -> None:
    """Whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    partial.replace(file)


def _padded(rows: Sequence[Sequence[int]]) -> IntArray:
    width = max((len(one) for one in rows), default=0)
    table = np.full((len(rows), width), -1, dtype=np.int64)
    for place, one in enumerate(rows):
        table[place, : len(one)] = one
    return table


def _words(refused: Mapping[str, int]) -> str:
    return "; ".join(f"{reason}: {count}" for reason, count in refused.items()) or "there are no histories"
