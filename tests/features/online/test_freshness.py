"""Ingest, follower and reader as processes: fresh within 5 s (p95), and 1,000 users equal to the log."""

import os

import pytest

from benchmarks.freshness import measure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reactions_are_served_within_five_seconds_and_a_thousand_users_equal_the_log() -> None:
    facts = measure(users=1_000, reactions=100)
    assert facts["unequal"] == 0
    assert facts["p95_s"] < 5
    assert facts["late_p95_s"] < 5


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.timeout(900)
@pytest.mark.skipif("KAFKA_HOME" not in os.environ, reason="KAFKA_HOME names no Apache Kafka")
def test_the_same_on_apache_kafka() -> None:
    facts = measure(users=200, reactions=60, kind="kafka")
    assert facts["unequal"] == 0
    assert facts["p95_s"] < 5
