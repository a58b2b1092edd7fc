"""The registry: directories are the truth, MLflow mirrors them and is repaired."""

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from policies.errors import PoliciesError
from policies.ledger import PromotionLedger
from policies.registry import Registry, UnknownPolicy
from policies.runs import read_notes
from policies.settings import RegistrySettings

OFF = RegistrySettings(mlflow=False)


def stage(registry: Registry, **lineage: Any) -> Path:
    """A staging directory with a manifest and one file: what write_policy leaves, less the weights."""
    staging = registry.staging()
    staging.mkdir(parents=True)
    (staging / "weights.bin").write_bytes(b"w" * 100)
    manifest = {"format": 1, "kind": "adapter", "version": None, "lineage": lineage}
    (staging / "policy.json").write_text(json.dumps(manifest))
    return staging


def test_registering_numbers_policies_and_moves_the_directory(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    staging = stage(registry, parent=None)
    assert registry.register(staging) == "v1"
    assert registry.register(stage(registry, parent="v1")) == "v2"
    assert not staging.exists()
    assert (registry.path("v1") / "weights.bin").read_bytes() == b"w" * 100
    assert registry.show("v2")["version"] == "v2"
    assert [(policy.version, policy.parent) for policy in registry.list()] == [("v1", None), ("v2", "v1")]


def test_a_policys_lineage_is_itself_and_what_it_descends_from(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    for parent in (None, "v1", "v1", "v3", "v9", "v6"):  # v9 is gone, v6 says that it descends from itself
        registry.register(stage(registry, parent=parent))
    assert registry.lineage("v4") == ("v4", "v3", "v1")
    assert registry.lineage("v2") == ("v2", "v1")
    assert registry.lineage("v5") == ("v5", "v9")
    assert registry.lineage("v6") == ("v6",)


def test_versions_sort_by_number_not_by_letter(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    for _ in range(11):
        registry.register(stage(registry))
    assert registry.versions()[-2:] == ["v10", "v11"]


def test_a_round_that_registers_again_after_a_kill_gets_the_same_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    first = registry.register(stage(registry), round_id="r1")
    assert registry.register(stage(registry), round_id="r1") == first
    assert registry.register(stage(registry), round_id="r2") == "v2"


def test_what_is_half_written_is_neither_listed_nor_registered(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    registry.register(stage(registry))
    half = registry.staging()
    half.mkdir()
    (half / "policy.json").write_text('{"format": 1, "ki')
    with pytest.raises(PoliciesError, match=r"policy\.json"):
        registry.register(half)
    (registry.directory / "v7").mkdir()
    assert [policy.version for policy in registry.list()] == ["v1"]
    with pytest.raises(PoliciesError, match="damaged"):
        registry.show("v7")


@pytest.mark.parametrize("version", ["v9", "", "v", "../v1", "latest", ".staging-x"])
def test_an_unknown_version_is_bad_input(tmp_path: Path, version: str) -> None:
    registry = Registry(tmp_path, OFF)
    registry.register(stage(registry))
    with pytest.raises(UnknownPolicy, match="policy list") as raised:
        registry.path(version)
    assert raised.value.exit_code == 2


def _register(home: str, barrier: object, results: object) -> None:
    registry = Registry(Path(home), OFF)
    staging = stage(registry)
    barrier.wait()  # type: ignore[attr-defined]
    results.put(registry.register(staging))  # type: ignore[attr-defined]


def test_processes_that_register_at_once_get_different_versions(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(8), fork.Queue()
    racers = [fork.Process(target=_register, args=(str(tmp_path), barrier, results)) for _ in range(8)]
    for racer in racers:
        racer.start()
    versions = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join(timeout=30)
    assert sorted(versions) == [f"v{n}" for n in range(1, 9)]
    assert {registry["version"] for registry in map(Registry(tmp_path, OFF).show, versions)} == set(versions)


def _noted_then_killed(registry: Registry) -> None:
    with registry.round_run("r1") as run:
        run.params({"beta": 0.5, "stage": {"epochs": 3}})
        run.metrics({"loss": 0.7}, step=1)
        raise RuntimeError("killed")


def test_a_killed_rounds_notes_are_kept_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    registry = Registry(tmp_path, OFF)
    with pytest.raises(RuntimeError):
        _noted_then_killed(registry)
    path = tmp_path / "rounds" / "r1" / "run.jsonl"
    assert read_notes(path.parent).status == "FAILED"  # type: ignore[union-attr]
    path.write_text(path.read_text() + '{"metrics": {"lo')
    with registry.round_run("r1") as run:
        run.metrics({"loss": 0.5}, step=2)
    notes = read_notes(path.parent)
    assert notes is not None
    assert notes.status == "FINISHED"
    assert notes.params == {"beta": "0.5", "stage.epochs": "3"}
    assert [(name, value, step) for name, value, step, _ in notes.points] == [
        ("loss", 0.7, 1),
        ("loss", 0.5, 2),
    ]


def test_an_unreachable_mlflow_postpones_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Port 9 (discard) of this machine: refused at once, nothing leaves the machine.
    down = Registry(tmp_path, RegistrySettings(uri="http://127.0.0.1:9", timeout=1))
    version = down.register(stage(down))
    assert down.mirror(PromotionLedger(tmp_path / "ledger")) is False
    assert "postponed" in caplog.text
    assert down.versions() == [version]


def test_mlflow_is_built_from_the_directories_and_its_alias_is_repaired(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    ledger = PromotionLedger(tmp_path / "ledger")
    for parent in (None, "v1"):
        registry.register(stage(registry, parent=parent))
    curve = tmp_path / "curve.json"
    curve.write_text("[1, 2]")
    with registry.round_run("r1") as run:
        run.params({"beta": 1.0})
        run.metrics({"loss": 0.6}, step=1)
        run.metrics({"loss": 0.4}, step=2)
        run.artifact(curve)
    ledger.promote("v1", expects=None, who="test", why="base")
    assert registry.mirror(ledger) is True

    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert client.get_model_version_by_alias("align3gr", "reference").tags["policy"] == "v1"
    (found,) = client.search_runs([client.get_experiment_by_name("align3gr-rounds").experiment_id])
    assert (found.data.params, found.data.metrics, found.info.status) == (
        {"beta": "1.0"},
        {"loss": 0.4},
        "FINISHED",
    )
    assert [item.path for item in client.list_artifacts(found.info.run_id)] == ["curve.json"]

    ledger.promote("v2", expects="v1", who="test", why="better")
    client.delete_registered_model_alias("align3gr", "reference")
    started = time.monotonic()
    assert registry.mirror(ledger) is True
    assert client.get_model_version_by_alias("align3gr", "reference").tags["policy"] == "v2"
    assert len(client.search_model_versions("name = 'align3gr'")) == 2, "a repair must not register twice"
    assert len(client.search_runs([found.info.experiment_id])) == 1
    # Generous: a repair of nothing takes well under a second.
    assert time.monotonic() - started < 20
