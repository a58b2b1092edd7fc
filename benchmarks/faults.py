"""Faults under load: is every event in the log exactly once, whatever was killed or stopped meanwhile?

Streams events through a broker into several ingest workers, and kills workers (SIGKILL), stops them past
their session and continues them (SIGSTOP, SIGCONT), and kills the broker, each at a moment when acknowledged
events have not landed yet. Then it counts the *raw* rows, before any deduplication at read time:

    lost   acknowledged event_ids that are not in the log
    twice  rows beyond the first of one event_id, or of one (partition, offset)

    KAFKA_HOME=... python benchmarks/faults.py --json                     the full run, 5 to 8 minutes
    python benchmarks/faults.py --events 4000 --kills 2 --stops 1 --broker-kills 0

Broker kills need a real Kafka: the embedded broker keeps nothing.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import duckdb
from stream import broker_in, interaction, start_worker, working_folder

from features.log import FeedbackLog
from ingest.broker import Broker, settings_for
from ingest.lag import lag, landed_offsets
from ingest.producer import FeedbackProducer
from ingest.settings import KafkaSettings
from ingest.topics import TopicIdentity, create_topics, identify

SESSION_S = 3.0
RATE, TRICKLE, TICK_S = 2_500, 100, 0.02
"""Events a second while a chunk is sent, and between chunks; seconds between two sends."""


class Stream:
    """Sends events 0..total from a thread of its own: fast up to ``allowed``, beyond it a trickle.

    The trickle goes on while a fault waits for its moment, so that there always is something to land.
    """

    def __init__(self, producer: FeedbackProducer, total: int) -> None:
        self.producer, self.total = producer, total
        self.sent = self.allowed = 0
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        while self.sent < self.total:
            rate = RATE if self.sent < self.allowed else TRICKLE
            for _ in range(min(int(rate * TICK_S), self.total - self.sent)):
                self.producer.send(interaction(self.sent))
                self.sent += 1
            time.sleep(TICK_S)

    def finish(self) -> None:
        """Send the rest and end."""
        self.allowed = self.total
        self._thread.join()


class Faults:
    """The workers and the broker of one run, and what is done to them."""

    def __init__(self, home: Path, broker: Broker, workers: int, seed: int, settings: dict[str, str]) -> None:
        self.home, self.broker, self.random, self.settings = home, broker, random.Random(seed), settings
        self.revived = 0
        self.workers = [self._start() for _ in range(workers)]

    def _start(self) -> subprocess.Popen[bytes]:
        log = self.home / "workers.log"
        return start_worker(self.home, self.broker.bootstrap_servers, log, **self.settings)

    def kill(self) -> None:
        """SIGKILL a random worker and start another."""
        chosen = self.random.randrange(len(self.workers))
        self.workers[chosen].kill()
        self.workers[chosen].wait()
        self.workers[chosen] = self._start()

    def revive(self) -> None:
        """As a supervisor does: start again what ended by itself (it found no broker when it started)."""
        for number, worker in enumerate(self.workers):
            if worker.poll() is not None:
                self.workers[number] = self._start()
                self.revived += 1

    def stop_and_continue(self) -> None:
        """SIGSTOP a random worker until the group has given its partitions away, then SIGCONT."""
        worker = self.random.choice(self.workers)
        worker.send_signal(signal.SIGSTOP)
        time.sleep(SESSION_S + 2.0)
        worker.send_signal(signal.SIGCONT)

    def kill_broker(self) -> None:
        """SIGKILL the broker and start it on the same data."""
        self.broker.kill()
        self.broker.start()

    def end(self) -> list[int]:
        """SIGTERM every worker; their exit codes."""
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        return [worker.wait(60) for worker in self.workers]


def run(arguments: argparse.Namespace, home: Path, broker: Broker) -> dict[str, object]:
    """One run; the facts that are printed."""
    kafka = settings_for(broker, KafkaSettings(partitions=arguments.partitions, delivery_timeout_s=60))
    create_topics(kafka)
    settings = {
        "INGEST__SESSION_TIMEOUT_S": str(SESSION_S),
        "INGEST__LINGER_S": "0.2",
        "INGEST__BATCH_ROWS": "2000",
    }
    faults = Faults(home, broker, arguments.workers, arguments.seed, settings)
    kinds = ["kill"] * arguments.kills + ["stop"] * arguments.stops + ["broker"] * arguments.broker_kills
    faults.random.shuffle(kinds)
    begun, lags, landed = time.monotonic(), [], 0
    try:
        with FeedbackProducer(kafka) as producer:
            stream = Stream(producer, arguments.events)
            identity = identify(kafka)
            chunk = arguments.events // (len(kinds) + 1)
            for number, kind in enumerate(kinds, start=1):
                stream.allowed = chunk * number
                time.sleep(faults.random.uniform(0.1, 1.0) * chunk / RATE)
                waiting, landed = _wait_for_lag(faults, producer, identity, landed)
                lags.append(waiting)
                {"kill": faults.kill, "stop": faults.stop_and_continue, "broker": faults.kill_broker}[kind]()
                _note(arguments, f"{number}/{len(kinds)} {kind} at lag {waiting}, {stream.sent} sent")
            stream.finish()
            report = producer.flush(120)
        _wait_landed(faults, kafka, timeout_s=240)
        codes = faults.end()
    finally:
        for worker in faults.workers:
            if worker.poll() is None:
                worker.kill()
    failed = {one.event_id for one in report.failed}
    return {
        "broker": broker.kind,
        "events": arguments.events,
        "acknowledged": report.acknowledged,
        "reported_undelivered": len(failed),
        **count(home / "log", [interaction(n).event_id for n in range(arguments.events)], failed),
        "kills": arguments.kills,
        "stops": arguments.stops,
        "broker_kills": arguments.broker_kills,
        "workers": arguments.workers,
        "least_lag_at_a_fault": min(lags, default=None),
        "workers_revived": faults.revived,
        "worker_exit_codes": codes,
        "seconds": round(time.monotonic() - begun, 1),
    }


def count(log: Path, sent: list[str], undelivered: set[str]) -> dict[str, int]:
    """Rows of the raw log against what was sent: rows, lost, twice by event_id and by (partition, offset)."""
    files = FeedbackLog.open(log, create=False).snapshot().files
    rows = duckdb.execute(
        "select event_id, kafka_partition, kafka_offset from read_parquet(?, hive_partitioning = true)",
        [files],
    ).fetchall()
    stored = {event_id for event_id, _, _ in rows}
    places = {(partition, offset) for _, partition, offset in rows}
    return {
        "rows": len(rows),
        "lost": len(set(sent) - undelivered - stored),
        "twice": len(rows) - len(stored),
        "twice_by_offset": len(rows) - len(places),
    }


def _wait_for_lag(
    faults: Faults, producer: FeedbackProducer, identity: TopicIdentity, landed_before: int
) -> tuple[int, int]:
    """Until workers landed something since the last fault and something waits; how much waits, has landed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        faults.revive()
        landed = sum(landed_offsets(faults.home / "log", identity).values())
        waiting = producer.report().acknowledged - landed
        if waiting > 0 and landed > landed_before:
            return waiting, landed
        time.sleep(0.01)
    raise RuntimeError("no lag within 60 s: the fault would hit an idle pipeline; give more --events")


def _wait_landed(faults: Faults, kafka: KafkaSettings, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while lag(kafka, faults.home / "log").waiting:
        faults.revive()
        if time.monotonic() > deadline:
            raise RuntimeError(f"still behind after {timeout_s} s: {lag(kafka, faults.home / 'log')}")
        time.sleep(0.5)


def _note(arguments: argparse.Namespace, line: str) -> None:
    if not arguments.json:
        sys.stderr.write(line + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--broker-kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="Folder for broker, log and workers' output; kept.")
    parser.add_argument("--json", action="store_true", help="Print one object as the last line.")
    arguments = parser.parse_args()
    with working_folder(arguments.keep) as folder, broker_in(folder / "broker") as broker:
        if arguments.broker_kills and not broker.keeps_data:
            parser.error("broker kills need a real Kafka: set KAFKA_HOME, or give --broker-kills 0")
        facts = run(arguments, folder, broker)
    print(json.dumps(facts) if arguments.json else "\n".join(f"{k:<22} {v}" for k, v in facts.items()))
    sys.exit(1 if facts["lost"] or facts["twice"] or facts["twice_by_offset"] else 0)


if __name__ == "__main__":
    main()
