"""A canary through real processes: broker, ingest, server, scheduler; the last two are killed halfway."""

import http.client
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from benchmarks.canary import asking
from benchmarks.serving import build_policies
from features.settings import FeatureSettings
from ingest.settings import KafkaSettings
from policies.ledger import PromotionLedger
from policies.settings import CanarySettings, PolicySettings, PromotionSettings
from policies.shares import takes_part
from tests.brokers import command_line
from tests.features.online.factory import push_histories
from trainer.canary import look
from trainer.workplace import Workplace

USERS = [f"user-{number}" for number in range(500)]
KEY = "a key"
SETTINGS = {
    "SERVER__PORT": "0",
    "SERVER__THREADS": "1",
    "SERVER__API_KEY": KEY,
    "SERVER__SAMPLE_SHARE": "0",
    "FEATURES__ATTRIBUTION_WINDOW_S": "1",
    "INGEST__WATERMARK_INTERVAL_S": "0.5",
    "POLICIES__PROMOTION__CANARY__LOOK_S": "1",
    "POLICIES__PROMOTION__CANARY__STEP_S": "5",
    "POLICIES__PROMOTION__CANARY__DEADLINE_S": "30",
    "SCHEDULE__MIN_FEEDBACK": "1000000000",
}
CANARY = CanarySettings(look_s=1.0, step_s=5.0)


class Processes:
    """The product's own, started and killed."""

    def __init__(self, kafka: KafkaSettings, home: Path) -> None:
        self._kafka, self._home = kafka, home
        self._running: dict[str, subprocess.Popen[str]] = {}
        self.port = 0

    def start(self, name: str, *options: str) -> None:
        command, environment = command_line(self._kafka, self._home, name, *options, **SETTINGS)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        self._running[name] = process
        if name == "serve":
            assert process.stdout is not None
            self.port = int(json.loads(process.stdout.readline())["address"].rpartition(":")[2])

    def kill(self, name: str) -> None:
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for name in list(self._running):
            self.kill(name)


@pytest.fixture
def processes(kafka: KafkaSettings, tmp_path: Path) -> Iterator[Processes]:
    build_policies(tmp_path, items=300, width=32, layers=1)
    push_histories(tmp_path / "online", {user: ["item-1", "item-2"] for user in USERS})
    running = Processes(kafka, tmp_path)
    running.start("ingest")
    running.start("serve", "--json")
    running.start("scheduler")
    try:
        yield running
    finally:
        running.end()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("canary_likes", "action", "share"), [(0.1, "withdraw", None), (0.8, "canary", 0.3)], ids=["harm", "gain"]
)
def test_a_canary_whose_server_and_scheduler_are_killed_ends_as_it_would_have(
    processes: Processes, tmp_path: Path, canary_likes: float, action: str, share: float | None
) -> None:
    ledger = PromotionLedger(tmp_path / "ledger")
    ledger.start_canary("v2", 0.25, expects="v1", who="test", why="try")
    begun = ledger.canary()
    assert begun is not None
    place = Workplace(
        tmp_path,
        FeatureSettings(attribution_window_s=1.0),
        PolicySettings(promotion=PromotionSettings(canary=CANARY)),
    )
    mets = {True: canary_likes, False: 0.5}
    expected = {user: "v2" if takes_part(user, begun) else "v1" for user in USERS}

    def evidence() -> tuple[int, str]:
        found = look(place)
        assert found is not None
        return found.decision.users, found.decision.why

    def lived(users: list[str]) -> None:
        """Each user gets a slate, sees it, likes some of it."""
        draw = np.random.default_rng(len(users) + int(users[0].partition("-")[2]))
        until(lambda: asked(processes.port, USERS[-1]) is not None)
        until(lambda: health(processes.port)["canary"] == "v2")
        for user in users:
            slate = asked(processes.port, user)
            assert slate is not None
            assert slate["policy_version"] == expected[user]
            likes = draw.random(len(slate["items"])) < mets[expected[user] == "v2"]
            posted(processes.port, slate, likes.tolist())

    def among(users: list[str]) -> int:
        return sum(expected[user] == "v2" for user in users)

    first, second = USERS[:250], USERS[250:]
    lived(first)
    assert among(first) < CANARY.min_users < among(USERS)
    until(lambda: evidence()[0] == among(first))
    before = evidence()

    with asking(processes.port, 4):
        time.sleep(0.5)
        processes.kill("serve")
        processes.kill("scheduler")
    assert ledger.canary() == begun
    assert evidence() == before

    processes.start("serve", "--json")
    lived(second)
    until(lambda: evidence()[0] == among(USERS))
    would_be = look(place)
    assert would_be is not None
    moves = len(ledger.history())
    processes.start("scheduler")
    until(lambda: len(ledger.history()) > moves)
    entry = ledger.history()[moves]
    assert (entry.action, entry.target, entry.who, entry.share) == (action, "v2", "canary", share)
    assert entry.why == would_be.decision.why
    until(lambda: health(processes.port)["canary_share"] == share)


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def request(port: int, method: str, path: str, body: object = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def health(port: int) -> dict:
    return request(port, "GET", "/health")[1]


def asked(port: int, user: str) -> dict | None:
    status, slate = request(port, "GET", f"/recommendations?user_id={user}&k=10")
    return slate if status == 200 else None


def posted(port: int, slate: dict, likes: list[bool]) -> None:
    about = {key: slate[key] for key in ("request_id", "user_id", "policy_version")}
    reactions = [
        {
            **about,
            "event_id": f"{kind}-{slate['request_id'][:32]}-{item['position']}",
            "item_id": item["item_id"],
            "position": item["position"],
            "kind": kind,
            "occurred_at": datetime.now(UTC).isoformat(),
        }
        for item, liked in zip(slate["items"], likes, strict=True)
        for kind in ("impression", *(["like"] if liked else []))
    ]
    status, told = request(port, "POST", "/feedback", {"interactions": reactions})
    assert (status, told["refused"]) == (202, [])
