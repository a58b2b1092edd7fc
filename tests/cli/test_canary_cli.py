"""`align3gr policy canary` and `withdraw`: what they print, and what they refuse in one line."""

import json
from pathlib import Path

import pytest

from policies.ledger import PromotionLedger
from tests.cli.test_policy_cli import call
from tests.policies.factory import write_tiny_policy


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canary")
    for number in (1, 2, 3):
        write_tiny_policy(folder / f"v{number}", version=f"v{number}", seed=number)
    return folder


@pytest.fixture
def home(policies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN3GR_HOME", str(tmp_path))
    (tmp_path / "policies").symlink_to(policies)
    PromotionLedger(tmp_path / "ledger").promote("v1", expects=None, who="setup", why="base")
    return tmp_path


def test_a_canary_is_begun_looked_at_and_withdrawn(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "policy", "canary")
    assert (code, out) == (0, "there is no canary\n")
    code, out, _ = call(capsys, "policy", "canary", "v2", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["action"], facts["to"], facts["share"], facts["reference"]) == ("canary", "v2", 0.05, "v1")
    code, out, _ = call(capsys, "policy", "canary")
    assert code == 0
    assert out.startswith("v2 beside v1, 0.05 of users: wait, 0 users can be compared")
    code, out, _ = call(capsys, "policy", "withdraw", "v2", "--why", "complaints")
    assert code == 0
    assert "withdrew the canary v2, v1 serves everybody: complaints" in out
    code, out, _ = call(capsys, "policy", "history")
    assert "gave v2 0.05 of users beside v1: by hand" in out


def test_a_rollback_takes_the_canary_back_and_leaves_the_reference(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "policy", "canary", "v2")
    code, out, _ = call(capsys, "policy", "rollback", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["action"], facts["to"], facts["reference"]) == ("withdraw", "v2", "v1")


def test_list_and_status_show_a_running_canary(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:9")
    monkeypatch.setenv("ALIGN3GR_KAFKA__CONNECT_TIMEOUT_S", "0.2")
    _, out, _ = call(capsys, "policy", "list", "--json")
    assert json.loads(out)["canary"] is None
    call(capsys, "policy", "canary", "v2")
    canary = PromotionLedger(home / "ledger").canary()
    assert canary is not None
    since = f"0.05 of users since {canary.began_at:%Y-%m-%d %H:%M} UTC"
    _, out, _ = call(capsys, "policy", "list")
    assert [line[:4] for line in out.splitlines() if line[0] in "*c"] == ["* v1", "c v2", "* re"]
    assert out.endswith(f"c canary: {since}\n")
    _, out, _ = call(capsys, "policy", "list", "--json")
    assert json.loads(out)["canary"]["share"] == 0.05
    _, out, _ = call(capsys, "status")
    assert f"canary     v2, {since}\n" in out


def test_impossible_canaries_are_refused_in_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(capsys, "policy", "canary", "v2")
    for arguments, cause in [
        (("canary", "v3"), "v2 is the canary and has 0.05 of users"),
        (("canary", "v3", "--share", "0"), "above 0 and below 1, not 0"),
        (("canary", "v3", "--share", "1.5"), "above 0 and below 1, not 1.5"),
        (("canary", "v9"), "v9"),
        (("promote", "v3"), "v2 is the canary"),
        (("withdraw", "v3"), "v3 is not the canary (v2 is)"),
    ]:
        code, _, error = call(capsys, "policy", *arguments)
        assert (code, error.count("\n")) == (2, 1), arguments
        assert cause in error


def test_shares_out_of_range_in_the_settings_are_named(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN3GR_POLICIES__PROMOTION__CANARY__STEPS", "[0.05, 1.5]")
    code, _, error = call(capsys, "policy", "canary")
    assert (code, error.count("\n")) == (2, 1)
    assert "policies.promotion.canary.steps" in error
    monkeypatch.setenv("ALIGN3GR_POLICIES__PROMOTION__CANARY__STEPS", "[0.25, 0.05, 1]")
    code, _, error = call(capsys, "policy", "canary")
    assert code == 2
    assert "shares must grow and end with 1" in error
