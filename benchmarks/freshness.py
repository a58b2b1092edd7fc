"""From a reaction to the served history: seconds, and whether online features equal the log.

    python benchmarks/freshness.py [--json] [--reactions 200] [--users 1000]
    KAFKA_HOME=... python benchmarks/freshness.py --broker kafka --json

A broker, one ``align3gr ingest`` and one ``align3gr features follow`` run as processes. First the events of
1,000 users are replayed through them, and what is online afterwards is compared, user by user, with DuckDB
over the log. Then reactions are published one by one, every fifth of them a day late, and each is timed from
the moment it is sent until the reader that the server uses gives it in that user's history (s).
``--json``: the last line is one object [reactions, p50_s, p95_s, late_p95_s, users, unequal, ...].
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from features.duck import connect, view_of
from features.interactions import Interaction, Kind
from features.log import FeedbackLog, LogMissing
from features.online.contexts import OnlineFeatures
from features.settings import FeatureSettings
from ingest.broker import Broker
from ingest.producer import FeedbackProducer
from ingest.settings import KafkaSettings
from ingest.topics import create_topics

SETTINGS = FeatureSettings()
KINDS = (Kind.LIKE, Kind.CLICK, Kind.DISLIKE, Kind.IMPRESSION, Kind.PURCHASE)
EXPECTED = """
    with events as (
        select * from log qualify row_number() over (
            partition by user_id, event_id order by landed_at, kafka_partition, kafka_offset) = 1
    ),
    engaged as (
        select *, row_number() over (
            partition by user_id
            order by occurred_at desc, landed_at desc, kafka_partition desc, kafka_offset desc) as recency
        from events
        where level = 1 or (kind in ('click', 'rating', 'review', 'purchase') and level is distinct from -1)
    ),
    latest as (
        select user_id, item_id, min(recency) as recency from engaged where recency <= 40
        group by user_id, item_id
        qualify row_number() over (partition by user_id order by min(recency)) <= 20
    )
    select events.user_id,
        coalesce(any_value(history.items), []) as history,
        list_sort(list(distinct events.item_id) filter (kind <> 'served')) as seen
    from events
    left join (select user_id, list(item_id order by recency desc) as items from latest group by user_id)
        as history using (user_id)
    group by events.user_id
"""


def main() -> None:
    """Run, print a table, and with ``--json`` one object as the last line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--reactions", type=int, default=200)
    arguments.add_argument("--users", type=int, default=1_000)
    arguments.add_argument("--broker", choices=("embedded", "kafka"), default="embedded")
    options = arguments.parse_args()
    facts = measure(options.users, options.reactions, options.broker)
    for name, value in facts.items():
        print(f"{name:<12} {value}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(facts))


def measure(users: int, reactions: int, kind: Literal["embedded", "kafka"] = "embedded") -> dict[str, Any]:
    """Replay, compare, then time reactions; the facts of the table."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home = scratch / "home"
        kafka_home = Path(os.environ["KAFKA_HOME"]) if kind == "kafka" else None
        broker = stack.enter_context(Broker(kind, scratch / "broker", kafka_home=kafka_home))
        kafka = KafkaSettings(bootstrap_servers=broker.bootstrap_servers)
        create_topics(kafka)
        producer = stack.enter_context(FeedbackProducer(kafka))
        for command in (["ingest"], ["features", "follow"]):
            process = _start(command, home, broker.bootstrap_servers)
            stack.callback(_end, process)
        chance = random.Random(0)
        started = time.perf_counter()
        sent = _replay(producer, chance, users)
        _await_rows(home, sent)
        reader = OnlineFeatures.open(home / "online", SETTINGS.online)
        unequal = _until_equal(home, reader, users)
        replayed = time.perf_counter() - started
        waits = [_time_one(producer, reader, number, chance.randrange(users)) for number in range(reactions)]
        late = waits[::5]
        unequal = max(unequal, _until_equal(home, reader, users))
    return {
        "reactions": reactions,
        "p50_s": round(float(np.percentile(waits, 50)), 2),
        "p95_s": round(float(np.percentile(waits, 95)), 2),
        "late_p95_s": round(float(np.percentile(late, 95)), 2),
        "max_s": round(max(waits), 2),
        "users": users,
        "unequal": unequal,
        "replayed": sent,
        "replay_s": round(replayed, 1),
        "broker": kind,
    }


def _replay(producer: FeedbackProducer, chance: random.Random, users: int) -> int:
    """30 events a user, in no particular order, over the last ten days."""
    now = datetime.now(UTC)
    count = 30 * users
    for number in range(count):
        producer.send(
            Interaction(
                event_id=f"r{number}",
                user_id=f"user-{chance.randrange(users)}",
                item_id=f"item-{chance.randrange(2_000)}",
                kind=chance.choice(KINDS),
                occurred_at=now - timedelta(seconds=chance.uniform(60, 864_000)),
            )
        )
    failed = producer.flush().failed
    assert not failed, failed[:3]
    return count


def _time_one(producer: FeedbackProducer, reader: OnlineFeatures, number: int, user: int) -> float:
    """Seconds from sending one like until it is in the history that the server would read."""
    late = timedelta(days=1) if number % 5 == 0 else timedelta()
    user_id, item_id = f"user-{user}", f"fresh-{number}"
    began = time.perf_counter()
    producer.send(
        Interaction(
            event_id=f"f{number}",
            user_id=user_id,
            item_id=item_id,
            kind=Kind.LIKE,
            occurred_at=datetime.now(UTC) - late,
        )
    )
    while item_id not in reader.contexts([user_id])[0].history:
        time.sleep(0.02)
        if time.perf_counter() - began > 60:
            raise RuntimeError(f"reaction {number} was not served within a minute")
    return time.perf_counter() - began


def _until_equal(home: Path, reader: OnlineFeatures, users: int) -> int:
    """Users whose online history or seen items differ from DuckDB over the log, once the follower is idle."""
    differing = users
    deadline = time.perf_counter() + 120
    while differing and time.perf_counter() < deadline:
        time.sleep(1)
        differing = _unequal(home, reader, users)
    return differing


def _unequal(home: Path, reader: OnlineFeatures, users: int) -> int:
    with connect(SETTINGS) as con:
        view_of(con, "log", FeedbackLog.open(home / "log").snapshot())
        expected = {user: (history, seen) for user, history, seen in con.execute(EXPECTED).fetchall()}
    differing = 0
    ids = [f"user-{number}" for number in range(users)]
    for start in range(0, users, 100):
        for found in reader.contexts(ids[start : start + 100]):
            history, seen = expected.get(found.user_id, ([], []))
            differing += list(found.history) != history or found.seen != frozenset(seen or [])
    return differing


def _await_rows(home: Path, count: int) -> None:
    deadline = time.perf_counter() + 300
    landed = 0
    while landed < count:
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{landed} of {count} events landed within five minutes")
        time.sleep(0.5)
        try:
            snapshot = FeedbackLog.open(home / "log", create=False).snapshot()
        except LogMissing:
            continue
        with connect(SETTINGS) as con:
            view_of(con, "log", snapshot)
            row = con.execute("select count(*) from log").fetchone()
            landed = row[0] if row else 0


def _start(command: list[str], home: Path, bootstrap: str) -> "subprocess.Popen[bytes]":
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ALIGN3GR_")}
    return subprocess.Popen(
        [sys.executable, "-m", "align3gr", *command],
        env={**ours, "ALIGN3GR_HOME": str(home), "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": bootstrap},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
