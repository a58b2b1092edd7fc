"""The policy directory: manifest, hashes, verification, and writing it so that nobody ever sees half of one.

::

    policy.json                what it is; written last, so a directory without it is no policy
    model/                     kind "full": config.json, model.safetensors, tokenizer files
    adapter/                   kind "adapter": adapter_config.json, adapter_model.safetensors
    codec/                     see policies.codec
    popularity.json            item ids, most liked first

An adapter names its base by version and by the sha256 of the base's policy.json, which in turn names every
file of the base: one hash pins everything. The base is the sibling directory ``../<base version>`` (or lies
below the policies folder that the caller names). This module imports no torch: listing policies is cheap.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import PolicyRefused

FORMAT = 1
MANIFEST = "policy.json"

_HARMLESS = re.compile(r"(?!.*\.\.)[\w-][\w./-]*\.(json|safetensors|txt|model|jinja)")
"""Files that a policy may hold: data only, below its own directory."""

Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""One path component."""


class Base(BaseModel):
    """The full policy that an adapter stands on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Version
    sha256: str
    """Of the base's policy.json."""


class CodecHashes(BaseModel):
    """What the codec directory must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantizer_hash: str
    item_map_hash: str


class Manifest(BaseModel):
    """policy.json. ``files`` names every other file of the directory with its sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    version: Version
    prompt_template: str
    kind: Literal["full", "adapter"]
    base: Base | None = None
    codec: CodecHashes
    files: dict[str, str]
    lineage: dict[str, Any] = {}
    """parent, dataset_id, round_id, settings, metrics, created_at: where it comes from."""


def read_manifest(directory: Path) -> Manifest:
    """Raises PolicyRefused when there is no manifest, an unreadable one, or one from the future."""
    file = directory / MANIFEST
    if not directory.is_dir():
        raise PolicyRefused(f"there is no policy at {directory}; see `align3gr policy list`")
    if not file.is_file():
        raise PolicyRefused(
            f"policy {directory} is half written: it has no {MANIFEST}; delete it and run the round again"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.get("format") != FORMAT:
            raise PolicyRefused(
                f"policy {directory} has format {facts.get('format')}, not {FORMAT}; update align3gr"
            )
        manifest = Manifest.model_validate(facts)
    except (OSError, ValueError, ValidationError) as error:
        cause = " ".join(str(error).split())
        raise PolicyRefused(
            f"policy {directory}: {MANIFEST} cannot be read: {cause}; roll back to another policy"
        ) from error
    strange = [name for name in manifest.files if not _HARMLESS.fullmatch(name)]
    if strange:
        raise PolicyRefused(
            f"policy {directory} names {strange[0]!r}, which is neither JSON, text nor safetensors; "
            "a policy holds no code and no pickles: roll back to another policy"
        )
    return manifest


def manifest_hash(directory: Path) -> str:
    """sha256 of policy.json. Raises PolicyRefused when there is none."""
    try:
        return _sha256(directory / MANIFEST)
    except OSError as error:
        raise PolicyRefused(f"policy {directory} has no {MANIFEST}; see `align3gr policy list`") from error


def verify(directory: Path) -> Manifest:
    """Read the manifest and every byte it names.

    Raises PolicyRefused, naming the first file that is missing, changed, or not in the manifest.
    """
    manifest = read_manifest(directory)
    found = _files(directory)
    way_out = "restore it from a backup, or roll back to another policy"
    for name, expected in manifest.files.items():
        if name not in found:
            raise PolicyRefused(f"policy {directory} lacks {name}; {way_out}")
        if _sha256(directory / name) != expected:
            raise PolicyRefused(f"policy {directory}: {name} is not the file it was written with; {way_out}")
    for name in found:
        if name not in manifest.files:
            raise PolicyRefused(
                f"policy {directory} holds {name}, which its manifest does not name; {way_out}"
            )
    return manifest


def base_directory(directory: Path, manifest: Manifest, policies: Path | None = None) -> Path:
    """Where an adapter's base lies: below ``policies``, or beside ``directory``.

    Raises PolicyRefused when it is not there or is not the base that the adapter was trained on.
    """
    if manifest.base is None:
        return directory
    base = (directory.parent if policies is None else policies) / manifest.base.version
    if not (base / MANIFEST).is_file():
        raise PolicyRefused(
            f"policy {directory} stands on {manifest.base.version}, which is not at {base}; "
            "copy the base policy there"
        )
    if manifest_hash(base) != manifest.base.sha256:
        raise PolicyRefused(
            f"policy {directory} stands on another {manifest.base.version} than the one at {base}; "
            "restore the base policy it was trained on"
        )
    return base


def base_of(directory: Path) -> Base:
    """What an adapter trained on the policy at ``directory`` names as its base: itself, or its own base."""
    manifest = read_manifest(directory)
    return manifest.base or Base(version=manifest.version, sha256=manifest_hash(directory))


def write_directory(
    directory: Path, fill: Callable[[Path], None], seal: Callable[[Mapping[str, str]], Manifest]
) -> Manifest:
    """Make a policy directory appear whole or not at all.

    ``fill`` writes the files into a staging directory beside the target; ``seal`` turns their hashes into the
    manifest, which is written last; then one rename. Raises PolicyRefused when the target exists.
    """
    if directory.exists():
        raise PolicyRefused(f"{directory} exists already; a policy is never rewritten, choose another place")
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        fill(staging)
        manifest = seal({name: _sha256(staging / name) for name in _files(staging)})
        write_manifest(staging, manifest)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _sync(directory.parent)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write policy.json durably, replacing what is there in one step."""
    for name in manifest.files:
        _sync(directory / name)
    temporary = directory / f".{MANIFEST}.partial"
    temporary.write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    _sync(temporary)
    temporary.replace(directory / MANIFEST)
    _sync(directory)


def _files(directory: Path) -> list[str]:
    names = (
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() or path.is_symlink()
    )
    return sorted(name for name in names if name != MANIFEST)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
