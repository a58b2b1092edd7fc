"""The registry: numbered policy directories under ``home/policies``, and MLflow as their mirror.

One idea: the directory is the truth. ``register`` turns a finished staging directory into ``v<N>`` by one
atomic rename; a policy that has its number is complete. MLflow (versions of one registered model, rounds as
runs, alias ``reference``) is brought up to date from it whenever it can be reached, so nothing is lost while
it cannot.
"""

import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import BadInput

from .errors import PoliciesError, PolicyRefused
from .ledger import PromotionLedger
from .runs import RoundRun
from .settings import RegistrySettings

log = logging.getLogger(__name__)

MANIFEST = "policy.json"


class UnknownPolicy(PoliciesError, BadInput):  # noqa: N818 - reads as what it is at the raise site
    """No policy of that version is registered here."""


@dataclass(frozen=True)
class RegisteredPolicy:
    """What the manifest of a registered policy says of it, without loading it."""

    version: str
    path: Path
    kind: str
    parent: str | None
    dataset_id: str | None
    round_id: str | None
    created_at: str | None
    metrics: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "version": self.version,
            "kind": self.kind,
            "parent": self.parent,
            "dataset_id": self.dataset_id,
            "round_id": self.round_id,
            "created_at": self.created_at,
            "metrics": self.metrics,
            "path": str(self.path),
        }


class Registry:
    """Policies of one home directory. Any number of processes may register at once.

    Invariant: version numbers grow and are never reused while their directory exists; a registered
    directory is never written again.
    """

    def __init__(self, home: Path, settings: RegistrySettings | None = None) -> None:
        self.home = home
        self.settings = settings or RegistrySettings()
        self.directory = home / "policies"

    def register(self, staging: Path, *, round_id: str | None = None) -> str:
        """Give the policy in ``staging`` (same file system) its version: ``v<N>``, returned.

        The version is written into its manifest first; the rename publishes it. With ``round_id`` a second
        call after a kill returns the version that the first one gave.
        Raises PoliciesError when ``staging`` holds no policy manifest.
        """
        if round_id is not None:
            for policy in self.list():
                if policy.round_id == round_id:
                    return policy.version
        manifest = _read_manifest(staging)
        if manifest is None:
            raise PoliciesError(
                f"{staging} holds no readable {MANIFEST}: write the policy again, then register it"
            )
        if round_id is not None:
            manifest.setdefault("lineage", {})["round_id"] = round_id
        self.directory.mkdir(parents=True, exist_ok=True)
        while True:
            version = f"v{max((_number(name) for name in self.versions()), default=0) + 1}"
            manifest["version"] = version
            _write_manifest(staging, manifest)
            try:
                staging.rename(self.directory / version)
            except OSError as error:
                if (self.directory / version).exists():
                    continue
                raise PoliciesError(
                    f"{staging} cannot become {self.directory / version}: {error.strerror}; the staging "
                    "directory must be on the same file system as home/policies"
                ) from error
            _sync(self.directory)
            log.info("registered version=%s round=%s", version, round_id)
            return version

    def versions(self) -> list[str]:
        """Registered versions, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if _number(path.name) and path.is_dir())
        return sorted(names, key=_number)

    def list(self) -> "list[RegisteredPolicy]":
        """All registered policies whose manifest can be read, oldest first; others are named in the log."""
        found = (self._described(version) for version in self.versions())
        return [policy for policy in found if policy is not None]

    def path(self, version: str) -> Path:
        """Directory of ``version``. Raises UnknownPolicy."""
        path = self.directory / version
        if not _number(version) or not path.is_dir():
            raise UnknownPolicy(
                f"policy {version} is not registered in {self.directory}: see align3gr policy list"
            )
        return path

    def show(self, version: str) -> dict[str, Any]:
        """The whole manifest of ``version``. Raises UnknownPolicy, PolicyRefused when it is unreadable."""
        manifest = _read_manifest(self.path(version))
        if manifest is None:
            raise PolicyRefused(
                f"policy {version} has no readable {MANIFEST}: it is damaged, restore or remove it"
            )
        return manifest

    def lineage(self, version: str) -> tuple[str, ...]:
        """``version`` and the policies it descends from, newest first, as far as manifests tell."""
        found: tuple[str, ...] = ()
        parent: str | None = version
        while parent is not None and parent not in found:
            found += (parent,)
            described = self._described(parent)
            parent = described.parent if described is not None else None
        return found

    def staging(self) -> Path:
        """A new name beside the policies for a staging directory (not created)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / f".staging-{uuid.uuid4().hex[:12]}"

    def round_run(self, round_id: str) -> RoundRun:
        """Context in which a round notes what it does; ``mirror`` sends the notes to MLflow."""
        return RoundRun(self.home / "rounds" / round_id)

    def mirror(self, ledger: PromotionLedger) -> bool:
        """Bring MLflow up to date: missing versions and runs, and the alias ``reference``.

        True when MLflow now shows what is here. False, with a warning, when it is switched off, not
        installed or out of reach: everything stays here and the next call repairs it.
        """
        if not self.settings.mlflow:
            return False
        from .mlflow_mirror import mirror

        return mirror(self, ledger.reference())

    def _described(self, version: str) -> RegisteredPolicy | None:
        manifest = _read_manifest(self.directory / version)
        if manifest is None:
            log.warning("policy damaged version=%s cause=unreadable manifest", version)
            return None
        lineage = manifest.get("lineage") or {}
        return RegisteredPolicy(
            version=version,
            path=self.directory / version,
            kind=str(manifest.get("kind", "unknown")),
            parent=lineage.get("parent"),
            dataset_id=lineage.get("dataset_id"),
            round_id=lineage.get("round_id"),
            created_at=lineage.get("created_at"),
            metrics=lineage.get("metrics") or {},
        )


def _number(name: str) -> int:
    """7 for ``v7``; 0 for what is no version."""
    return int(name[1:]) if name[:1] == "v" and name[1:].isdigit() else 0


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step, synced."""
    temporary = directory / f".{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / MANIFEST)
    _sync(directory)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
