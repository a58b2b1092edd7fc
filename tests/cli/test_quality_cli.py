"""quality show, accept and marked, and what status and round make of it."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from align3gr.__main__ import app
from align3gr.console import run
from features.log import LOG_SCHEMA, FeedbackLog
from policies.ledger import PromotionLedger
from tests.features.feedback_oracle import row
from tests.features.test_quality import BAD_DAYS, days
from tests.policies.factory import write_tiny_policy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "align3gr.yaml").write_text(
        "home: var\nfeatures: {quality: {min_events: 100}, duck: {threads: 1}}\n"
        "kafka: {bootstrap_servers: '127.0.0.1:9', connect_timeout_s: 0.5}\n"
    )
    return tmp_path / "var"


def land(home: Path, rows: list[dict]) -> None:
    FeedbackLog.open(home / "log").append(pa.Table.from_pylist(rows, schema=LOG_SCHEMA), {})


def test_a_bad_day_is_shown_held_and_accepted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    land(home, days(1, BAD_DAYS["user"]))
    assert run(app, ["quality", "show", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert "user greedy" in facts["held"][0]
    run(app, ["status", "--json"])
    assert json.loads(capsys.readouterr().out)["data"]["held"] == facts["held"]
    write_tiny_policy(home / "policies" / "v1")
    PromotionLedger(home / "ledger").promote("v1", expects=None, who="test", why="test")
    assert run(app, ["round"]) == 2
    assert "the data left its bounds: user greedy" in capsys.readouterr().err
    assert run(app, ["quality", "accept", "--why", "a load test"]) == 0
    capsys.readouterr()
    assert run(app, ["quality", "show"]) == 0
    assert "accepted: user greedy" in capsys.readouterr().out


def test_marked_feedback_is_counted_and_listed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = timedelta(days=60).total_seconds() / 60
    land(home, [row("served", request_id="r"), row("like", request_id="r", at=late, offset=1)])
    assert run(app, ["quality", "marked", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["marks"] == {"replayed": 1}
    assert [one["kind"] for one in facts["rows"]] == ["like"]


def test_without_a_log_or_a_breach_there_is_one_clear_line(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app, ["quality", "accept", "--why", "x"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    land(home, days(1))
    assert run(app, ["quality", "accept", "--why", "x"]) == 2
    assert "nothing to accept" in capsys.readouterr().err
    shutil.rmtree(home / "log")
    assert run(app, ["quality", "show"]) == 2
