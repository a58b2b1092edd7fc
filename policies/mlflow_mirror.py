"""MLflow shows what the registry, the rounds and the ledger hold. It is written here and nowhere else.

Every step is idempotent: a version is found by its tag ``policy``, a run by its tag ``round_id``, the alias
is set when it points elsewhere. No telemetry is sent.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import RunNotes, read_notes

if TYPE_CHECKING:
    from .registry import Registry

log = logging.getLogger(__name__)

ALIAS = "reference"
_MARK = "mlflow.json"
# Limits of one log_batch call (mlflow.utils.validation): metrics, params, characters of a param's value.
_METRICS, _PARAMS, _VALUE = 1000, 100, 6000


def mirror(registry: "Registry", reference: str | None) -> bool:
    """Bring MLflow up to date. False, and a warning that names the cause, when it cannot be done now."""
    try:
        with _lock(registry.home / "mlflow"):
            client = _client(registry)
            versions = _mirror_versions(client, registry)
            _mirror_runs(client, registry)
            _repair_alias(client, registry.settings.model, versions, reference)
    except ImportError:
        log.warning("mlflow mirror=skipped cause=not installed (pip install 'align3gr[learn]')")
        return False
    except Exception as error:  # noqa: BLE001 - whatever MLflow fails with, the local registry is the truth
        log.warning(
            "mlflow mirror=postponed cause=%s: %s", type(error).__name__, " ".join(str(error).split())
        )
        return False
    return True


def _client(registry: "Registry") -> Any:
    settings = registry.settings
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(settings.timeout))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    from mlflow.tracking import MlflowClient

    uri = settings.uri or f"sqlite:///{(registry.home / 'mlflow' / 'mlflow.db').resolve()}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _mirror_versions(client: Any, registry: "Registry") -> dict[str, str]:
    """Create what is missing; policy version -> MLflow version number."""
    model = registry.settings.model
    if not any(found.name == model for found in client.search_registered_models(f"name = '{model}'")):
        client.create_registered_model(model, description="Policies of align3gr; alias reference = promoted")
    known: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{model}'", max_results=200, page_token=token)
        known.update({found.tags["policy"]: found.version for found in page if "policy" in found.tags})
        token = page.token
        if not token:
            break
    for policy in registry.list():
        if policy.version not in known:
            tags = {"policy": policy.version, "kind": policy.kind}
            for key in ("parent", "dataset_id", "round_id"):
                value = getattr(policy, key)
                if value is not None:
                    tags[key] = str(value)
            made = client.create_model_version(model, source=str(policy.path.resolve()), tags=tags)
            known[policy.version] = made.version
    return known


def _repair_alias(client: Any, model: str, versions: dict[str, str], reference: str | None) -> None:
    """Point the alias where the ledger points."""
    if reference is None or reference not in versions:
        return
    shown = client.get_registered_model(model).aliases.get(ALIAS)
    if str(shown) != str(versions[reference]):
        client.set_registered_model_alias(model, ALIAS, versions[reference])


def _mirror_runs(client: Any, registry: "Registry") -> None:
    rounds = registry.home / "rounds"
    if not rounds.is_dir():
        return
    experiment: str | None = None
    for directory in sorted(path for path in rounds.iterdir() if path.is_dir()):
        notes = read_notes(directory)
        if notes is None or notes.status == "RUNNING" or _mark(directory) == notes.lines:
            continue
        experiment = experiment or _experiment(client, registry)
        _send_run(client, experiment, directory, notes)


def _experiment(client: Any, registry: "Registry") -> str:
    name = registry.settings.experiment
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = registry.settings.uri is None
    location = (registry.home / "mlflow" / "artifacts").resolve().as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=location))


def _send_run(client: Any, experiment: str, directory: Path, notes: RunNotes) -> None:
    """One run for the round; an earlier, shorter copy of it (a kill, a resume) is deleted."""
    from mlflow.entities import Metric, Param

    for stale in client.search_runs([experiment], f"tags.round_id = '{directory.name}'"):
        client.delete_run(stale.info.run_id)
    tags = {"round_id": directory.name, "mlflow.runName": directory.name}
    run_id = client.create_run(experiment, start_time=notes.started_at, tags=tags).info.run_id
    params = [Param(key[:250], value[:_VALUE]) for key, value in notes.params.items()]
    points = [Metric(key, value, at, step) for key, value, step, at in notes.points]
    for start in range(0, len(params), _PARAMS):
        client.log_batch(run_id, params=params[start : start + _PARAMS])
    for start in range(0, len(points), _METRICS):
        client.log_batch(run_id, metrics=points[start : start + _METRICS])
    for path in notes.artifacts:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        elif path.exists():
            client.log_artifact(run_id, str(path))
        else:
            log.warning("mlflow artifact missing round=%s path=%s", directory.name, path)
    client.set_terminated(run_id, status=notes.status, end_time=notes.ended_at)
    (directory / _MARK).write_text(json.dumps({"run_id": run_id, "lines": notes.lines}), encoding="utf-8")


def _mark(directory: Path) -> int:
    """How many lines of the notes MLflow already has; -1: none."""
    try:
        return int(json.loads((directory / _MARK).read_text(encoding="utf-8"))["lines"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """One mirror at a time for one home: two would create everything twice."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
