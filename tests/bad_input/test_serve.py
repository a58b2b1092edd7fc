"""A server without a key, on a port that is taken, or with a policy that does not load."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ingest.settings import KafkaSettings
from ingest.topics import reach
from tests.bad_input.place import Place, Running
from tests.bad_input.test_policies import flipped

EVENT = {"event_id": "1", "user_id": "u", "item_id": "item-001", "kind": "like"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_no_other_machine_is_served_without_a_key(place: Place, host: str) -> None:
    before, files = place.counts(), place.files()
    place.in_fork("serve", "--host", host, "--port", "0").refused(2, "no API key", "server.api_key")
    assert (place.counts(), place.files()) == (before, files)


def test_an_empty_key_is_no_key(place: Place) -> None:
    place.set(SERVER__API_KEY="")
    before, files = place.counts(), place.files()
    place.in_fork("serve", "--host", "0.0.0.0", "--port", "0").refused(2, "server.api_key")
    assert (place.counts(), place.files()) == (before, files)


def test_a_port_that_is_taken_is_named(place: Place) -> None:
    before, files = place.counts(), place.files()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        place.in_fork("serve", "--port", str(port)).refused(2, f"127.0.0.1:{port}", "server.port")
    assert (place.counts(), place.files()) == (before, files)


@contextmanager
def serving(place: Place) -> Iterator[tuple[str, Running]]:
    """A server at work; its address."""
    server = place.start("serve", "--port", "0", "--json")
    try:
        deadline = time.monotonic() + 120
        while not (server.out.exists() and server.out.read_text().endswith("\n")):
            assert server.alive, server.end()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield json.loads(server.out.read_text())["address"], server
    finally:
        if server.alive:
            server.interrupt()
        server.end()


def post(address: str, key: str | None) -> int:
    body = json.dumps({"interactions": [EVENT]}).encode()
    headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key is not None else {})
    request = urllib.request.Request(f"{address}/feedback", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def stored(kafka: KafkaSettings) -> int:
    return sum(at.end for at in reach(kafka).values())


def test_feedback_needs_the_key_and_a_server_without_one_takes_none(
    place: Place, embedded_kafka: KafkaSettings
) -> None:
    place.use(embedded_kafka)
    with serving(place) as (address, _):
        assert [post(address, key) for key in (None, "", "guess")] == [403, 403, 403]
    place.set(SERVER__API_KEY="secret")
    with serving(place) as (address, server):
        assert [post(address, key) for key in (None, "", "guess")] == [401, 401, 401]
        assert stored(embedded_kafka) == 0
    done = server.end()
    assert (done.code, done.err) == (130, "align3gr: stopped\n")


def test_a_server_with_a_damaged_policy_says_so_and_serves_once_it_is_restored(place: Place) -> None:
    policy = place.home / "policies" / "v1"
    weights = policy / "model" / "model.safetensors"
    whole = weights.read_bytes()
    flipped(policy)
    place.set(SERVER__RECORD_SERVED="false")
    with serving(place) as (address, server):
        assert status(f"{address}/health/ready") == 503
        weights.write_bytes(whole)
        deadline = time.monotonic() + 60
        while status(f"{address}/health/ready") != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    told = server.end().err
    assert "model.safetensors is not the file it was written with" in told
    assert "Traceback" not in told


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
