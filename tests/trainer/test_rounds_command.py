"""``align3gr round`` and ``align3gr scheduler`` as people start them: processes, exit codes, one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align3gr.__main__ import app
from align3gr.console import run
from features.log import FeedbackLog
from policies.ledger import PromotionLedger
from tests.trainer.round_world import POLICIES, TRAINER, make_home, workplace
from trainer.lease import Lease
from trainer.ranks import launch_command
from trainer.round_state import RoundState

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with feedback and a base policy. Read only: copy it."""
    return make_home(tmp_path_factory.mktemp("fresh") / "home")


@pytest.fixture
def home(fresh: Path, tmp_path: Path) -> Path:
    return copy(fresh, tmp_path / "home")


def copy(fresh: Path, home: Path, **changes: Any) -> Path:
    """A home of its own, its settings file too."""
    shutil.copytree(fresh, home)
    settings = yaml.safe_load((home / "settings.yaml").read_text())
    (home / "settings.yaml").write_text(yaml.safe_dump({**settings, "home": str(home), **changes}))
    return home


def command(home: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "align3gr", "--settings", str(home / "settings.yaml"), *arguments]


def finish(home: Path, *arguments: str) -> dict[str, Any]:
    """Run to the end, expect success; the facts of its last line."""
    done = subprocess.run(
        command(home, *arguments, "--json"), capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def kill_when(home: Path, arguments: list[str], reached: Callable[[], bool]) -> None:
    """Start the command and SIGKILL it as soon as ``reached``; what it started lives on."""
    said = home / "said.txt"  # a file: an orphan would hold a pipe open
    with said.open("w") as file:
        process = subprocess.Popen(
            command(home, *arguments), stdout=subprocess.DEVNULL, stderr=file, env=ENVIRONMENT
        )
    while process.poll() is None and not reached():
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, said.read_text()[-2000:]


def last_round(home: Path) -> RoundState:
    state = workplace(home).rounds.last()
    assert state is not None
    return state


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _no_reference(home: Path) -> None:
    shutil.rmtree(home / "ledger")


def _no_log(home: Path) -> None:
    shutil.rmtree(home / "log")


def _empty_log(home: Path) -> None:
    shutil.rmtree(home / "log")
    FeedbackLog.open(home / "log")


def _few_likes(home: Path) -> None:
    settings = yaml.safe_load((home / "settings.yaml").read_text())
    settings["features"] = {"dataset": {"min_samples": 100_000}}
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))


def _corrupt_reference(home: Path) -> None:
    with (home / "policies" / "v1" / "model" / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")


def _nothing(home: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("arguments", "before", "code", "words"),
    [
        (["round"], _no_reference, 2, "no policy is the reference yet"),
        (["round"], _no_log, 2, "no feedback log"),
        (["round"], _empty_log, 2, "the feedback log is empty"),
        (["round"], _few_likes, 2, "too few likes"),
        (["round"], _corrupt_reference, 2, "is not the file it was written with"),
        (["round", "--resume", "r0042"], _nothing, 2, "there is no round r0042"),
        (["round", "--device", "tpu"], _nothing, 2, "choose auto, cpu, cuda or cuda:N"),
        (["round", "--seed", "-1"], _nothing, 2, "--seed"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    home: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    before: Callable[[Path], None],
    code: int,
    words: str,
) -> None:
    before(home)
    rows = _rows(home)
    assert run(app, ["--settings", str(home / "settings.yaml"), *arguments]) == code
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert words in errors[0]
    assert _rows(home) == rows
    assert workplace(home).registry.versions() == ["v1"]


def test_every_gpu_is_launched_on_unless_one_is_named() -> None:
    assert launch_command("cpu", gpus=4) == []
    assert launch_command("cuda:1", gpus=4) == []
    assert launch_command("auto", gpus=0) == []
    several = launch_command("auto", gpus=4)
    assert several[1:3] == ["-m", "accelerate.commands.launch"]
    assert several[several.index("--num_processes") + 1] == "4"
    assert "--multi_gpu" in several
    assert "--multi_gpu" not in launch_command("cuda", gpus=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_round_command_killed_at_each_point_and_resumed(fresh: Path, tmp_path: Path) -> None:
    """For each point a round of its own, killed there once: the same dataset and figures every time."""
    whole = copy(fresh, tmp_path / "whole")
    wanted = finish(whole, "round", "--seed", "11")
    points: dict[str, Callable[[Path], bool]] = {
        "dataset half written": lambda home: any((home / "datasets").glob(".building-*/easy.parquet")),
        "mid easy": lambda home: lines(home / "rounds/r0001/easy/metrics.jsonl") >= 2,
        "between stages": lambda home: '"easy": {' in _state_text(home),
        "mid hard": lambda home: lines(home / "rounds/r0001/hard/metrics.jsonl") >= 2,
        "evaluation": lambda home: '"hard": {\n   "stage"' in _state_text(home),
        "registration": lambda home: (home / "policies/v2").exists(),
        "ledger move": lambda home: (home / "ledger/00000002.json").exists(),
    }
    for number, (point, reached) in enumerate(points.items()):
        home = copy(fresh, tmp_path / f"killed-{number}")
        kill_when(home, ["round", "--seed", "11"], lambda reached=reached, home=home: reached(home))
        found = finish(home, "round", "--resume", "last")
        for key in ("dataset_id", "stages", "evaluation", "outcome", "version", "seed"):
            assert found[key] == wanted[key], (point, key)
        for stage in ("easy", "hard"):
            file = f"rounds/r0001/{stage}/metrics.jsonl"
            assert (home / file).read_bytes() == (whole / file).read_bytes(), point
        assert PromotionLedger(home / "ledger").reference() == "v2", point


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_round_over_two_processes_has_the_same_dataset_and_losses(fresh: Path, tmp_path: Path) -> None:
    alone, shared = copy(fresh, tmp_path / "alone"), copy(fresh, tmp_path / "shared")
    one = finish(alone, "round", "--seed", "3")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = ["--settings", str(shared / "settings.yaml"), "round", "--seed", "3", "--json"]
    done = subprocess.run(
        [*launch, "-m", "align3gr", *arguments], capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout.splitlines()[-1])
    assert two["dataset_id"] == one["dataset_id"]
    assert len(done.stdout.splitlines()) == 1
    # Gradients are summed in another order; the first step sees the same weights.
    for stage in ("easy", "hard"):
        assert two["stages"][stage]["last"]["loss"] == pytest.approx(
            one["stages"][stage]["last"]["loss"], abs=0.01
        )
    assert two["outcome"] == one["outcome"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no device")
def test_a_round_on_a_gpu_has_the_dataset_and_the_first_losses_of_the_cpu(
    fresh: Path, tmp_path: Path
) -> None:
    homes = {device: copy(fresh, tmp_path / device) for device in ("cpu", "cuda")}
    facts = {
        device: finish(home, "round", "--seed", "3", "--device", device) for device, home in homes.items()
    }
    assert facts["cuda"]["device"].startswith("cuda")
    assert facts["cuda"]["dataset_id"] == facts["cpu"]["dataset_id"]
    for stage in ("easy", "hard"):
        cpu, gpu = (
            [json.loads(line)["loss"] for line in (home / f"rounds/r0001/{stage}/metrics.jsonl").open()][:20]
            for home in homes.values()
        )
        # float32 on both; sums in another order, through up to 40 steps of AdamW (easy, then hard).
        assert gpu == pytest.approx(cpu, abs=0.02), stage


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_round_is_a_run_in_mlflow_with_its_curves(fresh: Path, tmp_path: Path) -> None:
    policies = POLICIES.model_dump(mode="json")
    policies["registry"]["mlflow"] = True
    home = copy(fresh, tmp_path / "home", policies=policies)
    finish(home, "round", "--seed", "3")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("align3gr-rounds")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["parent"] == "v1"
    curve = client.get_metric_history(found.info.run_id, "easy/loss")
    rows = [json.loads(line) for line in (home / "rounds/r0001/easy/metrics.jsonl").open()]
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == [
        pytest.approx(row["loss"]) for row in rows
    ]
    assert client.get_model_version_by_alias("align3gr", "reference").tags["policy"] == "v2"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_scheduler_killed_in_a_round_neither_doubles_nor_loses_it(fresh: Path, tmp_path: Path) -> None:
    slower = TRAINER.model_dump(mode="json")
    slower["preference"]["stages"][0]["epochs"] = 60
    schedule = {"interval": 3600, "min_feedback": 100, "max_lag": None}
    home = copy(fresh, tmp_path / "home", schedule=schedule, trainer=slower)
    in_easy = lambda: lines(home / "rounds/r0001/easy/metrics.jsonl") >= 2  # noqa: E731
    kill_when(home, ["scheduler"], in_easy)
    # The orphan goes on and holds the lease: a second scheduler starts nothing.
    assert Lease(home / "rounds").is_held()
    found = finish(home, "scheduler", "--once")
    assert found["outcome"] == "waiting"
    assert "a round is running" in found["why"]
    # The orphan dies as well: the next look takes its round up.
    holder = Lease(home / "rounds").holder()
    assert holder is not None
    os.kill(holder, signal.SIGKILL)
    while Lease(home / "rounds").is_held():
        time.sleep(0.05)
    taken_up = subprocess.run(
        command(home, "scheduler", "--once"), capture_output=True, text=True, timeout=200, env=ENVIRONMENT
    )
    assert taken_up.returncode == 0, taken_up.stderr
    assert "resumed" in taken_up.stdout
    state = last_round(home)
    assert (state.round_id, state.status, state.attempts) == ("r0001", "finished", 2)
    # Nothing new has landed since: the next look waits.
    assert "0 new events" in finish(home, "scheduler", "--once")["why"]
    assert [round_.round_id for round_ in workplace(home).rounds.all()] == ["r0001"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_scheduler_ends_its_round_when_told_to_stop_and_takes_it_up_later(
    fresh: Path, tmp_path: Path
) -> None:
    slower = TRAINER.model_dump(mode="json")
    slower["preference"]["stages"][0]["epochs"] = 60
    schedule = {"interval": 3600, "min_feedback": 100, "max_lag": None}
    home = copy(fresh, tmp_path / "home", schedule=schedule, trainer=slower)
    scheduler = subprocess.Popen(
        command(home, "scheduler"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    while scheduler.poll() is None and lines(home / "rounds/r0001/easy/metrics.jsonl") < 2:
        time.sleep(0.01)
    scheduler.terminate()
    _, errors = scheduler.communicate(timeout=60)
    assert scheduler.returncode == 0, errors.decode()[-2000:]
    assert not Lease(home / "rounds").is_held()
    assert last_round(home).status == "running"
    assert finish(home, "round", "--resume", "last")["outcome"] == "promoted"


def _rows(home: Path) -> int:
    log = home / "log"
    return workplace(home).count_feedback(FeedbackLog.open(log).snapshot().files) if log.exists() else -1


def _state_text(home: Path) -> str:
    file = home / "rounds/r0001/state.json"
    return file.read_text() if file.exists() else ""
