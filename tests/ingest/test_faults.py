"""What may die while events stream: nothing is lost and nothing lands twice, counted in the raw rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ingest.broker import Broker

FAULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"


def faults(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """One fault run, its printed facts."""
    done = subprocess.run(
        [sys.executable, str(FAULTS), "--json", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def broken_promises(facts: dict[str, Any], events: int) -> dict[str, object]:
    """What of a fault run is not as promised, and by how much; empty when every event landed exactly once."""
    measured = {
        "lost": facts["lost"],
        "twice by event id": facts["twice"],
        "twice by offset": facts["twice_by_offset"],
        "acknowledged and not stored": max(facts["acknowledged"] - facts["rows"], 0),
        "neither acknowledged nor reported": events - facts["acknowledged"] - facts["reported_undelivered"],
        "faults with nothing under way": facts["least_lag_at_a_fault"] <= 0,
        # -15: it had just been started and was told to end before it had begun.
        "exit codes of workers": sorted(set(facts["worker_exit_codes"]) - {0, -15}),
    }
    return {promise: found for promise, found in measured.items() if found}


def test_killed_and_stopped_workers_neither_lose_nor_repeat_an_event() -> None:
    """A few faults on the embedded broker; the full run is the slow test below."""
    facts = faults(
        {"KAFKA_HOME": ""},
        *("--events", "6000", "--kills", "2", "--stops", "1", "--broker-kills", "0", "--workers", "2"),
    )
    assert broken_promises(facts, 6000) == {}


@pytest.mark.kafka
def test_a_killed_broker_that_comes_back_neither_loses_nor_repeats_an_event(real_kafka: Broker) -> None:
    facts = faults(
        {},
        *("--events", "6000", "--kills", "1", "--stops", "0", "--broker-kills", "1", "--workers", "2"),
    )
    assert broken_promises(facts, 6000) == {}
    assert facts["broker"] == "kafka"


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_ten_stops_and_five_broker_kills_lose_and_repeat_nothing(real_kafka: Broker) -> None:
    facts = faults({}, "--events", "200000", "--kills", "20", "--stops", "10", "--broker-kills", "5")
    assert broken_promises(facts, 200_000) == {}
    assert facts["broker"] == "kafka"
