"""The HTTP API around a real policy, a real online store and a real broker."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from kafka import KafkaConsumer

from align3gr.server.runtime import Runtime
from align3gr.settings import Settings
from features.catalogue import Catalogue, Item
from features.interactions import decode_interaction
from features.online.contexts import OnlineFeatures
from features.requests import verify_request
from ingest.broker import Broker
from tests.policies.factory import item_ids

KEY = {"X-API-Key": "secret"}
REACTION = {
    "event_id": "posted-1",
    "user_id": "user-1",
    "item_id": "item-100",
    "kind": "like",
    "occurred_at": datetime.now(UTC).isoformat(),
    "colour": "red",
}


def settings_of(home: Path, broker: Broker, **server: object) -> Settings:
    return Settings.model_validate(
        {
            "home": home,
            "kafka": {"bootstrap_servers": broker.bootstrap_servers, "connect_timeout_s": 2},
            "features": {"request_key": "signing key"},
            "server": {"api_key": "secret", "sample_share": 0, "warm_policies": 0, **server},
        }
    )


@contextmanager
def serving(settings: Settings, features: OnlineFeatures) -> Iterator[TestClient]:
    runtime = Runtime(settings, features)
    try:
        with TestClient(runtime.start()) as client:
            yield client
    finally:
        runtime.stop()


@pytest.fixture(scope="module")
def client(home: Path, broker: Broker, online_features: OnlineFeatures) -> Iterator[TestClient]:
    with serving(settings_of(home, broker), online_features) as client:
        yield client


def events_of(broker: Broker, request_id: str, count: int) -> list[dict[str, object]]:
    """The ``count`` events in Kafka that name the request, waited for; in the order of the topic."""
    consumer = KafkaConsumer(
        "interactions",
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    found: list[dict[str, object]] = []
    try:
        for record in consumer:
            event = json.loads(record.value)
            if request_id in (event.get("request_id"), event["event_id"]):
                found.append(event)
            if len(found) == count:
                return found
    finally:
        consumer.close()
    return found


def test_a_known_user_gets_unseen_items_from_the_policy_and_the_slate_is_recorded(
    client: TestClient, broker: Broker
) -> None:
    answer = client.get("/recommendations?user_id=user-3&k=5")
    slate = answer.json()
    assert answer.status_code == 200
    assert (slate["policy_version"], slate["sampled"], slate["degraded"]) == ("v1", False, False)
    items = [item["item_id"] for item in slate["items"]]
    assert len(set(items)) == 5
    assert not set(items) & set(item_ids(200)[3:11])
    assert {item["source"] for item in slate["items"]} == {"policy"}
    assert verify_request(b"signing key", slate["request_id"], "user-3")
    assert not verify_request(b"signing key", slate["request_id"], "user-4")

    recorded = events_of(broker, slate["request_id"], 5)
    assert [(event["item_id"], event["position"]) for event in recorded] == [
        (item, place) for place, item in enumerate(items, start=1)
    ]
    for event in recorded:
        decoded = decode_interaction(json.dumps(event).encode(), now=datetime.now(UTC))
        assert (decoded.kind, decoded.policy_version, decoded.propensity) == ("served", "v1", None)


def test_an_unknown_user_gets_what_is_popular(client: TestClient) -> None:
    slate = client.post("/recommendations", json={"user_id": "stranger", "k": 4}).json()
    assert [item["item_id"] for item in slate["items"]] == item_ids(4)
    assert {item["source"] for item in slate["items"]} == {"popularity"}


def test_the_same_request_again_is_another_slate_with_the_same_items(client: TestClient) -> None:
    first, second = (client.get("/recommendations?user_id=user-5").json() for _ in range(2))
    assert first["items"] == second["items"]
    assert first["request_id"] != second["request_id"]


def test_sampled_slates_carry_their_propensity(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    with serving(settings_of(home, broker, sample_share=1), online_features) as client:
        slate = client.get("/recommendations?user_id=user-3&k=5").json()
    assert slate["sampled"]
    propensities = [item["propensity"] for item in slate["items"]]
    assert all(0 < propensity <= 1 for propensity in propensities)
    recorded = events_of(broker, slate["request_id"], 5)
    assert [event["propensity"] for event in recorded] == propensities


def test_what_the_catalogue_delists_is_not_recommended(
    served_home: Path, home: Path, tmp_path: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    for name in ("policies", "online", "ledger"):
        (tmp_path / name).symlink_to((home / name).resolve())
    catalogue = Catalogue.open(tmp_path / "catalogue")
    catalogue.load(
        [Item(item_id=name, title=name, text="words") for name in item_ids(200)], now=datetime.now(UTC)
    )
    with serving(settings_of(tmp_path, broker, catalogue_seconds=0.05), online_features) as client:
        first = client.get("/recommendations?user_id=user-3&k=10").json()["items"]
        gone = {item["item_id"] for item in first[:5]}
        catalogue.delist(sorted(gone), now=datetime.now(UTC))
        for _ in range(500):
            left = {
                item["item_id"] for item in client.get("/recommendations?user_id=user-3&k=10").json()["items"]
            }
            if not left & gone:
                break
    assert not left & gone
    assert len(left) == 10


def test_feedback_is_acknowledged_and_bad_interactions_are_named(client: TestClient, broker: Broker) -> None:
    body = {"interactions": [REACTION, {**REACTION, "kind": "adore"}, {**REACTION, "kind": "served"}]}
    answer = client.post("/feedback", json=body, headers=KEY)
    assert answer.status_code == 202
    assert answer.json()["accepted"] == 1
    assert [(one["index"], one["reason"]) for one in answer.json()["refused"]] == [
        (1, "unknown_kind"),
        (2, "not_yours"),
    ]
    (stored,) = events_of(broker, "posted-1", 1)
    assert stored["colour"] == "red"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"X-API-Key": "wrong"}, 401), (KEY, 422), ({"Authorization": "Bearer secret"}, 422)],
    ids=["no key", "wrong key", "key", "bearer"],
)
def test_writing_asks_for_the_key(client: TestClient, headers: dict[str, str], status: int) -> None:
    body = {"interactions": [{"kind": "like"}]}  # refused as an interaction once the key is right
    assert client.post("/feedback", json=body, headers=headers).status_code == status


def test_too_much_feedback_at_once_is_refused(client: TestClient) -> None:
    answer = client.post("/feedback", json={"interactions": [REACTION] * 501}, headers=KEY)
    assert answer.status_code == 413


def test_reads_ask_for_the_key_where_the_settings_say_so_and_writes_always_do(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    closed = settings_of(home, broker, key_for_reads=True)
    with serving(closed, online_features) as client:
        assert client.get("/recommendations?user_id=u").status_code == 401
        assert client.get("/recommendations?user_id=u", headers=KEY).status_code == 200
    with serving(settings_of(home, broker, api_key=None), online_features) as client:
        answer = client.post("/feedback", json={"interactions": [REACTION]}, headers=KEY)
        assert answer.status_code == 403
        assert "server.api_key" in answer.json()["detail"]


def test_unreachable_kafka_delays_no_recommendation_and_refuses_feedback(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    settings = settings_of(home, broker, feedback_timeout_seconds=1, drain_seconds=0.1)
    nowhere = settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9", "connect_timeout_s": 0.5})
    with serving(settings.model_copy(update={"kafka": nowhere}), online_features) as client:
        slate = client.get("/recommendations?user_id=user-3")
        refused = client.post("/feedback", json={"interactions": [REACTION]}, headers=KEY)
        health = client.get("/health").json()
    assert slate.status_code == 200
    assert refused.status_code == 503
    assert "send it again" in refused.json()["detail"]
    assert "no Kafka broker answers" in health["kafka_error"]
    assert health["events_waiting"] == 10


def test_without_a_promoted_policy_the_server_lives_and_is_not_ready(
    served_home: Path, tmp_path: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    with serving(settings_of(tmp_path, broker), online_features) as client:
        answers = [
            client.get(path) for path in ("/health/live", "/health/ready", "/recommendations?user_id=u")
        ]
    assert [answer.status_code for answer in answers] == [200, 503, 503]
    assert "no policy has been promoted" in answers[2].json()["detail"]


def test_page_and_description_need_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    assert set(client.get("/openapi.json").json()["paths"]) == {
        "/recommendations",
        "/feedback",
        "/health",
        "/health/live",
        "/health/ready",
    }


def test_metrics_name_requests_policy_and_events(client: TestClient) -> None:
    client.get("/recommendations?user_id=user-3")
    exposition = client.get("/metrics").text
    assert 'align3gr_requests_total{endpoint="/recommendations",status="200"}' in exposition
    assert 'align3gr_policy{version="v1"} 1.0' in exposition
    assert 'align3gr_request_seconds_bucket{endpoint="/recommendations"' in exposition
    assert "align3gr_policy_swap_failures_total 0.0" in exposition


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/recommendations", 422),
        ("/recommendations?user_id=u&k=0", 422),
        ("/recommendations?user_id=u&k=101", 422),
        ("/recommendations?user_id=" + "u" * 257, 422),
        ("/nowhere", 404),
    ],
)
def test_bad_requests_are_named(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.json()["detail"]
