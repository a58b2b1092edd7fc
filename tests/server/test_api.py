"""The HTTP API around a real policy, a real online store and a real broker."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from kafka import KafkaConsumer

from align3gr.server.runtime import Runtime
from align3gr.settings import Settings
from features.interactions import decode_interaction
from features.online.contexts import OnlineFeatures
from features.requests import verify_request
from ingest.broker import Broker
from tests.policies.factory import item_ids

KEY = {"X-API-Key": "secret"}


def _settings(home: Path, broker: Broker, **server: object) -> Settings:
    return Settings.model_validate(
        {
            "home": home,
            "kafka": {"bootstrap_servers": broker.bootstrap_servers, "connect_timeout_s": 2},
            "features": {"request_key": "signing key"},
            "server": {"api_key": "secret", "sample_share": 0, "poll_seconds": 0.05, **server},
        }
    )


@pytest.fixture
def runtime(home: Path, broker: Broker, online_features: OnlineFeatures) -> Iterator[Runtime]:
    made = Runtime(_settings(home, broker), online_features)
    yield made
    made.stop()


@asynccontextmanager
async def _client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            yield client


def _events(broker: Broker) -> list[dict[str, object]]:
    consumer = KafkaConsumer(
        "interactions",
        bootstrap_servers=broker.bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=1500,
    )
    try:
        return [json.loads(record.value) for record in consumer]
    finally:
        consumer.close()


async def _ask(app: FastAPI, method: str, path: str, **options: object) -> httpx.Response:
    async with _client(app) as client:
        return await client.request(method, path, **options)


def run(coroutine: object) -> httpx.Response:
    import asyncio

    return asyncio.run(coroutine)


def test_a_known_user_gets_unseen_items_from_the_policy_and_the_slate_is_recorded(
    runtime: Runtime, broker: Broker
) -> None:
    answer = run(_ask(runtime.start(), "GET", "/recommendations?user_id=user-3&k=5"))
    slate = answer.json()
    assert answer.status_code == 200
    assert (slate["policy_version"], slate["sampled"], slate["degraded"]) == ("v1", False, False)
    items = [item["item_id"] for item in slate["items"]]
    assert len(set(items)) == 5
    assert not set(items) & set(item_ids(200)[3:11])
    assert {item["source"] for item in slate["items"]} == {"policy"}
    assert verify_request(b"signing key", slate["request_id"], "user-3")
    assert not verify_request(b"signing key", slate["request_id"], "user-4")

    assert runtime.recorder.stop(10) == 0
    recorded = [event for event in _events(broker) if event.get("request_id") == slate["request_id"]]
    assert [(event["item_id"], event["position"]) for event in recorded] == [
        (item, place) for place, item in enumerate(items, start=1)
    ]
    for event in recorded:
        decoded = decode_interaction(json.dumps(event).encode(), now=datetime.now(UTC))
        assert (decoded.kind, decoded.policy_version, decoded.propensity) == ("served", "v1", None)


def test_an_unknown_user_gets_what_is_popular(runtime: Runtime) -> None:
    slate = run(
        _ask(runtime.start(), "POST", "/recommendations", json={"user_id": "stranger", "k": 4})
    ).json()
    assert [item["item_id"] for item in slate["items"]] == item_ids(4)
    assert {item["source"] for item in slate["items"]} == {"popularity"}


def test_sampled_slates_carry_their_propensity(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    runtime = Runtime(_settings(home, broker, sample_share=1), online_features)
    slate = run(_ask(runtime.start(), "GET", "/recommendations?user_id=user-3&k=5")).json()
    runtime.stop()
    assert slate["sampled"]
    assert all(0 < item["propensity"] <= 1 for item in slate["items"])
    recorded = [event for event in _events(broker) if event.get("request_id") == slate["request_id"]]
    assert [event["propensity"] for event in recorded] == [item["propensity"] for item in slate["items"]]


def test_feedback_is_acknowledged_and_bad_interactions_are_named(runtime: Runtime, broker: Broker) -> None:
    good = {
        "event_id": "posted-1",
        "user_id": "user-1",
        "item_id": "item-100",
        "kind": "like",
        "occurred_at": datetime.now(UTC).isoformat(),
        "colour": "red",
    }
    body = {"interactions": [good, {**good, "kind": "adore"}, {**good, "kind": "served"}]}
    answer = run(_ask(runtime.start(), "POST", "/feedback", json=body, headers=KEY))
    assert answer.status_code == 202
    assert answer.json()["accepted"] == 1
    assert [(one["index"], one["reason"]) for one in answer.json()["refused"]] == [
        (1, "unknown_kind"),
        (2, "not_yours"),
    ]
    stored = [event for event in _events(broker) if event["event_id"] == "posted-1"]
    assert [event["colour"] for event in stored] == ["red"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 401), ({"X-API-Key": "wrong"}, 401), (KEY, 422), ({"Authorization": "Bearer secret"}, 422)],
    ids=["no key", "wrong key", "key", "bearer"],
)
def test_writing_asks_for_the_key(runtime: Runtime, headers: dict[str, str], status: int) -> None:
    body = {"interactions": [{"kind": "like"}]}  # refused as an interaction once the key is right
    assert run(_ask(runtime.start(), "POST", "/feedback", json=body, headers=headers)).status_code == status


def test_without_a_key_in_the_settings_nothing_may_be_written(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    runtime = Runtime(_settings(home, broker, api_key=None), online_features)
    answer = run(_ask(runtime.start(), "POST", "/feedback", json={"interactions": [{}]}, headers=KEY))
    runtime.stop()
    assert answer.status_code == 403
    assert "server.api_key" in answer.json()["detail"]


def test_unreachable_kafka_delays_no_recommendation_and_refuses_feedback(
    home: Path, broker: Broker, online_features: OnlineFeatures
) -> None:
    settings = _settings(home, broker, feedback_timeout_seconds=1, drain_seconds=0.1)
    nowhere = settings.kafka.model_copy(update={"bootstrap_servers": "127.0.0.1:9", "connect_timeout_s": 0.5})
    runtime = Runtime(settings.model_copy(update={"kafka": nowhere}), online_features)
    event = {
        "event_id": "lost-1",
        "user_id": "user-1",
        "item_id": "item-100",
        "kind": "like",
        "occurred_at": datetime.now(UTC).isoformat(),
    }

    async def both() -> tuple[httpx.Response, httpx.Response, dict[str, object]]:
        async with _client(runtime.start()) as client:
            slate = await client.get("/recommendations?user_id=user-3")
            refused = await client.post("/feedback", json={"interactions": [event]}, headers=KEY)
            return slate, refused, (await client.get("/health")).json()

    import asyncio

    slate, refused, health = asyncio.run(both())
    runtime.stop()
    assert slate.status_code == 200
    assert refused.status_code == 503
    assert "send it again" in refused.json()["detail"]
    assert "no Kafka broker answers" in str(health["kafka_error"])
    assert health["events_waiting"] == 10


def test_page_and_description_need_nothing_from_elsewhere(runtime: Runtime) -> None:
    app = runtime.start()
    page = run(_ask(app, "GET", "/docs")).text
    assert "http://" not in page
    assert "https://" not in page
    described = run(_ask_again(app, "/openapi.json")).json()
    assert {"/recommendations", "/feedback", "/health", "/health/live", "/health/ready"} == set(
        described["paths"]
    )


async def _ask_again(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
        return await client.get(path)


def test_metrics_name_requests_policy_and_events(runtime: Runtime) -> None:
    async def text() -> str:
        async with _client(runtime.start()) as client:
            await client.get("/recommendations?user_id=user-3")
            return (await client.get("/metrics")).text

    import asyncio

    exposition = asyncio.run(text())
    assert 'align3gr_requests_total{endpoint="/recommendations",status="200"} 1.0' in exposition
    assert 'align3gr_policy{version="v1"} 1.0' in exposition
    assert "align3gr_request_seconds_bucket" in exposition
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
def test_bad_requests_are_named(runtime: Runtime, path: str, status: int) -> None:
    answer = run(_ask(runtime.start(), "GET", path))
    assert answer.status_code == status
    assert msgspec.json.decode(answer.content)["detail"]
