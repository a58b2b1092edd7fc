"""Canaries: how soon a bad one is withdrawn, and whether a good one is left alone.

    python benchmarks/canary.py answers [--how healthy|sleeps|fails] [--runs 20] [--share 0.05] [--busy 0]
    python benchmarks/canary.py users [--users 20000] [--runs 50]
    python benchmarks/canary.py alarms [--users 5000] [--runs 1000]

*answers*: a real ``align3gr serve`` with the default settings of a canary and 8 clients that ask as fast as
they are answered. v2 becomes the canary, ``--runs`` times for SECONDS each or until it is withdrawn; it is as
large as the reference, and is healthy, sleeps a second before each list, or fails at each. ``--busy``:
processes that compute all the time beside it.
*users*: courses of canaries whose true worth is known (benchmarks/loop/canary_world.py), looked at after
every batch of visits, until they are promoted, withdrawn, or LOOKS are over.
*alarms*: canaries that are as good as the reference, looked at as often: how many are withdrawn for harm.

Each part is a key of the file of results (``--out``, default benchmarks/results/canary.json), with command,
commit, device, date and seconds; ``--json`` prints it as the last line.
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.loop.canary_world import course
from benchmarks.loop.trials import wilson
from benchmarks.measuring import circumstances, clocks, record, since
from benchmarks.serving import USERS, Response, Server, ask, build_policies, land_users
from features.online.follow import follow
from features.settings import FeatureSettings
from ingest.broker import Broker
from ingest.settings import KafkaSettings
from ingest.topics import create_topics
from policies.ledger import PromotionLedger

SECONDS = 15.0
"""That a canary is left to serve, unless it is withdrawn."""
CLIENTS = 8
EFFECTS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1)
LOOKS = 200
VISITS = 0.04
"""Between two looks, as a share of all users."""


@contextmanager
def asking(port: int, clients: int = CLIENTS) -> Iterator[list[Response]]:
    """``clients`` that ask for random users as fast as they are answered; the answers so far."""
    responses: list[Response] = []
    over = threading.Event()

    def client(number: int) -> None:
        users = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not over.is_set():
            responses.append(ask(connection, f"user-{users.randrange(USERS)}"))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield responses
    finally:
        over.set()
        for thread in threads:
            thread.join()


def build_home(home: Path, *, items: int, width: int, layers: int) -> None:
    """Policies, of which v1 is the reference, and users that the server knows."""
    build_policies(home, items, width, layers)
    land_users(home, items)
    follow(home / "log", home / "online", FeatureSettings(), once=True)


@contextmanager
def serving(home: Path, how: str) -> Iterator[Server]:
    """A server on what ``build_home`` made, whose v2 is healthy, or misbehaves."""
    with Broker("embedded", home / f"broker-{how}") as broker:
        create_topics(KafkaSettings(bootstrap_servers=broker.bootstrap_servers))
        settings = {
            "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "ALIGN3GR_SERVER__THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.server.misbehaving", how] if how != "healthy" else None
        with Server(home, settings, command) as server:
            yield server


def trial(ledger: PromotionLedger, server: Server, share: float, seconds: float = SECONDS) -> dict[str, Any]:
    """v2 as the canary for ``seconds`` or until it is withdrawn, under load; what became of it."""
    first = len(ledger.history())
    with asking(server.port) as responses:
        while server.get("/health")["canary"] is not None:
            time.sleep(0.05)
        began = datetime.now(UTC)
        ledger.start_canary("v2", share, expects="v1", who="benchmark", why="try")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and ledger.canary() is not None:
            time.sleep(0.02)
    withdrawn = [entry for entry in ledger.history()[first:] if entry.action == "withdraw"]
    if not withdrawn:
        ledger.withdraw("v2", who="benchmark", why="over")
    meanwhile = [one for one in responses if one.received_at >= began]
    times = {
        version: [1000 * one.seconds for one in meanwhile if one.version == version]
        for version in ("v1", "v2")
    }
    return {
        "withdrawn_after_s": (withdrawn[0].at - began).total_seconds() if withdrawn else None,
        "why": withdrawn[0].why if withdrawn else None,
        "requests": len(responses),
        "failed": sum(one.version is None or one.items != 10 for one in responses),
        **{f"{version}_answers": len(found) for version, found in times.items()},
        **{f"{version}_p50_ms": _percentile(found, 50) for version, found in times.items()},
        **{f"{version}_p95_ms": _percentile(found, 95) for version, found in times.items()},
    }


def answers(how: str, runs: int, share: float, busy: int) -> dict[str, Any]:
    """``runs`` canaries on one server."""
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch)
            build_home(home, items=2000, width=128, layers=2)
            with serving(home, how) as server:
                ledger = PromotionLedger(home / "ledger")
                found = []
                for _ in range(runs):
                    found.append(trial(ledger, server, share))
                    _note(found[-1])
    finally:
        for process in burning:
            process.kill()
            process.wait()
    after = [one["withdrawn_after_s"] for one in found if one["withdrawn_after_s"] is not None]
    return {
        "how": how,
        "share": share,
        "clients": CLIENTS,
        "busy": busy,
        "runs": runs,
        "withdrawn": len(after),
        "withdrawn_after_s": {"median": _percentile(after, 50), "most": max(after, default=None)},
        "requests": sum(one["requests"] for one in found),
        "failed": sum(one["failed"] for one in found),
        "each": found,
    }


def users(number: int, runs: int) -> dict[str, Any]:
    """Courses of canaries whose true effect is known."""
    rows = []
    for effect in EFFECTS:
        found = [
            course(effect, seed=seed, users=number, visits=_visits(number), looks=LOOKS)
            for seed in range(runs)
        ]
        met = [one.met for one in found]
        rows.append(
            {
                "effect": effect,
                "runs": runs,
                "ended": dict(Counter(one.action for one in found)),
                "met_median": float(np.median(met)),
                "met_most": max(met),
                "looks_median": float(np.median([one.looks for one in found])),
            }
        )
        _note(rows[-1])
    return {"users": number, "visits_a_look": _visits(number), "looks": LOOKS, "rows": rows}


def alarms(number: int, runs: int) -> dict[str, Any]:
    """Canaries without a difference that are withdrawn for harm."""
    ended: Counter[str] = Counter()
    for seed in range(runs):
        ended[
            course(0.0, seed=1000 + seed, users=number, visits=_visits(number), looks=LOOKS // 4).action
        ] += 1
        if seed % 50 == 49:
            _note({"runs": seed + 1, **ended})
    return {
        "users": number,
        "visits_a_look": _visits(number),
        "looks": LOOKS // 4,
        "canaries": runs,
        "ended": dict(ended),
        "false_alarms": ended["withdraw"] / runs,
        "false_alarms_interval": wilson(ended["withdraw"], runs),
    }


def _visits(number: int) -> int:
    return round(VISITS * number)


def _percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 2) if values else None


def _note(facts: dict[str, Any]) -> None:
    sys.stderr.write(json.dumps(facts) + "\n")
    sys.stderr.flush()


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("answers", "users", "alarms"))
    parser.add_argument("--how", choices=("healthy", "sleeps", "fails"), default="healthy")
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--users", type=int, default=None)
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "canary.json")
    wanted = parser.parse_args()
    started, where = clocks(), circumstances()
    parts: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "answers": (
            f"answers_{wanted.how}_{wanted.share:g}_busy_{wanted.busy}",
            lambda: answers(wanted.how, wanted.runs or 20, wanted.share, wanted.busy),
        ),
        "users": (
            f"users_{wanted.users or 20_000}",
            lambda: users(wanted.users or 20_000, wanted.runs or 50),
        ),
        "alarms": (
            f"alarms_{wanted.users or 5_000}",
            lambda: alarms(wanted.users or 5_000, wanted.runs or 1000),
        ),
    }
    key, part = parts[wanted.part]
    facts = part()
    row = record(wanted.out, key, {**where, **since(started), **facts})
    if wanted.json:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
