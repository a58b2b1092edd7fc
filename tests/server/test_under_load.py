"""The reference moves while clients ask: nobody notices, and every answer names who gave it.

The full size (8 clients, 10,000 requests) is marked slow; ``benchmarks/serving.py`` measures the same.
"""

import json
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kafka import KafkaConsumer

from align3gr.__main__ import app
from align3gr.console import run
from benchmarks.serving import (
    Server,
    align3gr,
    build_policies,
    drive,
    environment,
    land_users,
    references_within,
)
from features.online.follow import follow
from features.settings import FeatureSettings
from ingest.broker import Broker
from policies.ledger import PromotionLedger


@pytest.fixture(scope="module")
def busy_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1 .. v3 and a damaged v4, v1 promoted, and 500 users online."""
    home = tmp_path_factory.mktemp("busy")
    build_policies(home, items=300, width=32, layers=1)
    land_users(home, items=300)
    follow(home / "log", home / "online", FeatureSettings(), once=True)
    return home


@pytest.fixture
def settings(broker: Broker) -> dict[str, str]:
    return {
        "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "ALIGN3GR_SERVER__THREADS": "1",
    }


def reset(home: Path) -> PromotionLedger:
    """Back to v1 as the reference, from wherever a test left it."""
    ledger = PromotionLedger(home / "ledger")
    if ledger.reference() != "v1":
        ledger.promote("v1", expects=ledger.reference(), who="test", why="reset")
    return ledger


def test_promotion_rollback_and_damaged_policies_fail_no_request(
    busy_home: Path, broker: Broker, settings: dict[str, str]
) -> None:
    ledger = reset(busy_home)
    started = datetime.now(UTC)
    with Server(busy_home, settings) as server:
        load = drive(busy_home, server.port, 600, 4, ("promote v2", "corrupt", "rollback"))
        metrics = server.text("/metrics")
        # Damaged on the disk after its promotion was checked: the last good one serves on, and says so.
        ledger.promote("v4", expects="v1", who="test", why="the check was skipped")
        health = server.get("/health")
        for _ in range(200):
            if health["policy_error"]:
                break
            time.sleep(0.02)
            health = server.get("/health")
        slate = server.get("/recommendations?user_id=user-1")
    assert len(load.responses) == 600
    assert [one for one in load.responses if one.version is None] == []
    assert load.stale() == 0
    assert {one.items for one in load.responses} == {10}
    assert {one.version for one in load.responses} == {"v1", "v2"}
    assert load.refused == 1
    assert "align3gr_policy_swaps_total 2.0" in metrics
    assert (health["ready"], health["policy_version"], health["reference"]) == (True, "v1", "v4")
    assert "model.safetensors is not the file it was written with" in health["policy_error"]
    assert slate["policy_version"] == "v1"
    # Stopping drains: every item of every answer is in Kafka, once.
    assert served_since(broker, started) == 10 * (600 + 1)


def served_since(broker: Broker, start: datetime) -> int:
    """Served events in Kafka that are from ``start`` on; fails when one is there twice."""
    consumer = KafkaConsumer(
        "interactions",
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=2000,
    )
    try:
        events = [json.loads(record.value) for record in consumer]
    finally:
        consumer.close()
    ids = [
        event["event_id"]
        for event in events
        if event["kind"] == "served" and datetime.fromisoformat(event["occurred_at"]) >= start
    ]
    assert len(ids) == len(set(ids))
    return len(ids)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--port", "{taken}"], "cannot listen on 127.0.0.1:{taken}"),
    ],
    ids=["no API key", "port taken"],
)
def test_an_address_that_must_not_or_cannot_be_used_is_one_line(
    busy_home: Path, broker: Broker, options: list[str], words: str
) -> None:
    taken = str(broker.port)
    done = subprocess.run(
        [*align3gr(), "serve", *(option.format(taken=taken) for option in options)],
        env=environment(busy_home, {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert words.format(taken=taken) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""


def test_the_window_of_two_seconds_is_counted_from_the_answer_back(tmp_path: Path) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = iter([start, start + timedelta(seconds=10), start + timedelta(seconds=11)])
    ledger = PromotionLedger(tmp_path, clock=lambda: next(times))
    ledger.promote("v1", expects=None, who="t", why="t")
    ledger.promote("v2", expects="v1", who="t", why="t")
    ledger.rollback(who="t", why="t")
    moves = ledger.history()
    at = [references_within(moves, start + timedelta(seconds=second)) for second in (5, 11.5, 12.5, 14)]
    assert at == [{"v1"}, {"v1", "v2"}, {"v1", "v2"}, {"v1"}]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_requests_of_eight_clients(busy_home: Path, settings: dict[str, str]) -> None:
    reset(busy_home)
    with Server(busy_home, settings) as server:
        load = drive(busy_home, server.port, 10_000, 8)
    assert len(load.responses) == 10_000
    assert [one for one in load.responses if one.version is None] == []
    assert load.stale() == 0
    assert load.refused == 2
    assert {one.version for one in load.responses} == {"v1", "v2", "v3"}


def test_show_prints_what_is_known_of_a_user(
    busy_home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN3GR_HOME", str(busy_home))
    assert run(app, ["features", "show", "user-7", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert (known["liked"], known["events"], len(known["item_ids"])) == (20, 20, 20)
    assert run(app, ["features", "show", "nobody"]) == 2
    assert "nothing is known online of user nobody" in capsys.readouterr().err
