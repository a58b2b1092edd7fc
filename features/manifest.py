"""The manifest of a preference dataset: what it was built from and how, what came out, and what was refused.

It is written last, in a folder that only then gets its name: a dataset without one is not a dataset.
"""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from .errors import BadInput, FeaturesError

Stage = Literal["easy", "hard"]
STAGES: dict[Stage, int] = {"easy": -1, "hard": 0}
"""Level of the rejected items of each stage: disliked, neutral."""

MANIFEST = "manifest.json"
FORMAT, WEIGHTED = 1, 2
"""Format of a dataset, and of one whose rows carry a weight."""


class DatasetMissing(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """There is no finished dataset where one was named."""


class StageCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage holds."""

    samples: int
    by_role: dict[str, int]
    refused: dict[str, int]
    """Likes of the window without a sample: ``no_negative``, ``above_user_cap``."""
    rows_hash: str
    replayed: int = 0
    """Of the samples those whose like arrived before the window."""
    older: int = 0
    """Samples these were drawn from: likes from before the window, of each user as many as the cap allows."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of one dataset. The id is a hash over the rows of both stages and of nothing else."""

    format: int
    dataset_id: str
    log_version: int
    """Delta version of the feedback log; vacuum keeps its files."""
    watermark: datetime | None
    since: datetime | None
    """Only likes that arrived after this became samples; None: all."""
    rules_hash: str
    queries_hash: str
    settings: dict[str, Any]
    """Every setting that decides the rows."""
    rows: int
    users: int
    unsigned: int
    """Rows left out because their request id was not signed by us."""
    duplicates: int
    """Rows dropped because the user's event had landed before."""
    likes: int
    """(user, item) pairs that are liked, the like inside the window."""
    stages: dict[str, StageCounts]
    warnings: list[str]
    built_at: datetime
    marked: dict[str, int] = {}
    """Rows left out as forged or too many, by mark; see TrustSettings."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` and see it onto the disk."""
    with (folder / MANIFEST).open("wb") as file:
        file.write(json.dumps(msgspec.to_builtins(manifest), indent=1, ensure_ascii=False).encode())
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest in ``folder``. Raises DatasetMissing when there is none that can be read."""
    try:
        raw = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DatasetMissing(
            f"{folder} holds no finished dataset ({error.strerror}); build one with align3gr round"
        ) from error
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise DatasetMissing(
            f"{folder / MANIFEST} cannot be read ({error}); build the dataset again"
        ) from error
    if manifest.format > WEIGHTED:
        raise DatasetMissing(
            f"{folder} has dataset format {manifest.format}, this version reads up to {WEIGHTED}; update it"
        )
    return manifest


def named_versions(datasets: Path) -> set[int]:
    """Delta versions of the log that the finished datasets were built from; vacuum keeps them."""
    return {read_manifest(path.parent).log_version for path in datasets.glob(f"[!.]*/{MANIFEST}")}
