"""`align3gr policy`: what it prints, what it refuses, how fast it rolls back."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align3gr.__main__ import app
from align3gr.console import run
from policies.ledger import PromotionLedger
from policies.registry import Registry
from policies.settings import RegistrySettings
from tests.policies.factory import write_tiny_policy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three registered policies (manifest only), v1 then v2 promoted."""
    monkeypatch.setenv("ALIGN3GR_HOME", str(tmp_path))
    registry = Registry(tmp_path, RegistrySettings(mlflow=False))
    for number in range(3):
        staging = registry.staging()
        staging.mkdir(parents=True)
        parent = f"v{number}" if number else None
        manifest = {"format": 1, "kind": "full", "files": {}, "lineage": {"parent": parent}}
        manifest |= {"prompt_template": "1", "codec": {"quantizer_hash": "q", "item_map_hash": "m"}}
        (staging / "policy.json").write_text(json.dumps(manifest))
        registry.register(staging)
    ledger = PromotionLedger(tmp_path / "ledger")
    ledger.promote("v1", expects=None, who="setup", why="base")
    ledger.promote("v2", expects="v1", who="setup", why="better")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_list_marks_the_reference(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "policy", "list", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["reference"], facts["anchor"], facts["held"]) == ("v2", "v1", False)
    assert [(row["version"], row["reference"]) for row in facts["policies"]] == [
        ("v1", False), ("v2", True), ("v3", False),
    ]  # fmt: skip
    code, out, _ = call(capsys, "policy", "list")
    assert code == 0
    assert "* v2" in out


def test_show_tells_lineage_and_moves(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "policy", "show", "v2", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["manifest"]["lineage"]["parent"] == "v1"
    assert [move["why"] for move in facts["moves"]] == ["better"]
    code, out, _ = call(capsys, "policy", "show", "v2")
    assert code == 0
    assert "promoted v2 in place of v1" in out


def test_rollback_then_resume_and_the_history_of_both(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "policy", "rollback", "--who", "ann", "--why", "complaints", "--json")
    assert code == 0
    assert json.loads(out)["reference"] == "v1"
    assert PromotionLedger(home / "ledger").held()
    code, _, _ = call(capsys, "policy", "resume", "--who", "ann")
    assert code == 0
    assert not PromotionLedger(home / "ledger").held()
    code, out, _ = call(capsys, "policy", "history")
    assert code == 0
    assert "ann rolled back from v2 to v1: complaints" in out
    assert len(out.splitlines()) == 4


def test_promote_refuses_what_does_not_load_and_moves_nothing(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "policy", "promote", "v3")
    assert code != 0
    assert out == ""
    assert len(err.splitlines()) == 1
    assert PromotionLedger(home / "ledger").reference() == "v2"


@pytest.mark.parametrize(
    "arguments", [("show", "v9"), ("promote", "v9"), ("rollback", "--to", "v9"), ("rollback", "--to", "v3")]
)
def test_an_unknown_version_is_bad_input_in_one_line(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = call(capsys, "policy", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert PromotionLedger(home / "ledger").reference() == "v2"


def test_a_rollback_needs_no_torch_and_little_time(home: Path) -> None:
    probe = (
        "import sys; from align3gr.__main__ import app; from align3gr.console import run; "
        "code = run(app, ['policy', 'rollback']); "
        "sys.exit(code or (9 if {'torch', 'mlflow', 'feast', 'transformers'} & set(sys.modules) else 0))"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert PromotionLedger(home / "ledger").reference() == "v1"
    # Under one second on an idle machine (measured 0.5); the allowance is for a loaded one.
    assert seconds < 5


def test_promote_moves_the_reference_to_a_policy_that_loads_and_never_to_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN3GR_HOME", str(tmp_path))
    registry = Registry(tmp_path, RegistrySettings(mlflow=False))
    for seed in (1, 2):
        staging = registry.staging()
        write_tiny_policy(staging, seed=seed)
        registry.register(staging)
    code, out, err = call(capsys, "policy", "promote", "v1", "--who", "ann", "--why", "base", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["reference"] == "v1"

    weights = tmp_path / "policies" / "v2" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, out, err = call(capsys, "policy", "promote", "v2")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert PromotionLedger(tmp_path / "ledger").reference() == "v1"
    code, _, err = call(capsys, "policy", "promote", "v1", "--expects", "v9")
    assert code == 1
    assert "look at" in err
