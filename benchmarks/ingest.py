"""How fast one ingest worker takes a topic into the committed log, against merely reading it.

    python benchmarks/ingest.py --json        with KAFKA_HOME: real Kafka, else the embedded broker

One run, one broker, one topic: the topic is filled, then in turn drained by the bare client (a poll loop that
keeps nothing) and ingested by ``align3gr ingest`` into a fresh log, ``--repeats`` times; medians count.

    events_per_s        one worker, from its first record taken to its last commit
    drain_per_s         the same client reading the same topic with the same options, collector off
    ratio               events_per_s / drain_per_s
    two_workers_per_s   rows landed by two workers, over the time in which both were at work

Broker and clients share this machine's cores; only ratios carry over to another one.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import duckdb
from kafka import KafkaConsumer, TopicPartition
from stream import broker_in, interaction, start_worker, working_folder

from features.log import FeedbackLog
from ingest.broker import settings_for
from ingest.producer import FeedbackProducer
from ingest.settings import IngestSettings, KafkaSettings
from ingest.topics import create_topics, reach


def drain(servers: str, topic: str) -> float:
    """Events a second of the bare client over the whole topic, from the first record to the last."""
    kafka = KafkaSettings(bootstrap_servers=servers, topic=topic)
    ends = reach(kafka)
    consumer = KafkaConsumer(group_id=None, **{**kafka.connection(), **IngestSettings().consumer()})
    partitions = [TopicPartition(topic, partition) for partition in ends]
    consumer.assign(partitions)
    for partition in partitions:
        consumer.seek(partition, 0)
    gc.disable()
    total, seen, begun = sum(at.end for at in ends.values()), 0, 0.0
    while seen < total:
        for records in consumer.poll(timeout_ms=250, max_records=IngestSettings().poll_records).values():
            begun = begun or time.monotonic()
            seen += len(records)
    return total / (time.monotonic() - begun)


def ingest(folder: Path, servers: str, name: str, workers: int) -> float:
    """Events a second of ``workers`` processes into a fresh log, over the time in which all were at work."""
    home = folder / name
    home.mkdir()
    outputs = [home / f"worker-{n}.out" for n in range(workers)]
    settings = {"INGEST__GROUP": name, "INGEST__SESSION_TIMEOUT_S": "6"}
    processes = [
        start_worker(home, servers, output, "--until-caught-up", "--json", **settings) for output in outputs
    ]
    for process, output in zip(processes, outputs, strict=True):
        if process.wait(600) != 0:
            raise RuntimeError(output.read_text())
    reports = [json.loads(output.read_text().splitlines()[-1]) for output in outputs]
    at_work = [report for report in reports if report["rows"]]
    begun = max(datetime.fromisoformat(report["first_taken_at"]) for report in at_work)
    ended = max(datetime.fromisoformat(report["last_landed_at"]) for report in at_work)
    files = FeedbackLog.open(home / "log").snapshot().files
    query = "select count(*) from read_parquet(?, hive_partitioning = true) where landed_at >= ?"
    (rows,) = duckdb.connect().execute(query, [files, begun]).fetchone() or (0,)
    return float(rows) / (ended - begun).total_seconds()


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Fill, drain and ingest in turn; the facts that are printed."""
    with broker_in(folder / "broker") as broker:
        kafka = settings_for(broker, KafkaSettings(partitions=arguments.partitions))
        create_topics(kafka)
        with FeedbackProducer(kafka) as producer:
            begun = time.monotonic()
            for n in range(arguments.events):
                producer.send(interaction(n))
            if producer.flush(120).acknowledged != arguments.events:
                raise RuntimeError("the broker did not take every event")
            produced = arguments.events / (time.monotonic() - begun)
        drains, ones = [], []
        for n in range(arguments.repeats):
            alone = [sys.executable, __file__, "--drain", broker.bootstrap_servers, kafka.topic]
            drains.append(float(subprocess.run(alone, capture_output=True, text=True, check=True).stdout))
            ones.append(ingest(folder, broker.bootstrap_servers, f"one-{n}", 1))
        two = ingest(folder, broker.bootstrap_servers, "two", 2)
    return {
        "broker": broker.kind,
        "events": arguments.events,
        "ratio": round(statistics.median(ones) / statistics.median(drains), 3),
        "events_per_s": round(statistics.median(ones)),
        "drain_per_s": round(statistics.median(drains)),
        "two_workers_per_s": round(two),
        "produced_per_s": round(produced),
        "ratios": [round(one / bare, 3) for one, bare in zip(ones, drains, strict=True)],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="Print one object as the last line.")
    parser.add_argument("--drain", nargs=2, metavar=("SERVERS", "TOPIC"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        print(drain(*arguments.drain))
        return
    with working_folder(None) as folder:
        facts = run(arguments, folder)
    print(json.dumps(facts) if arguments.json else "\n".join(f"{k:<18} {v}" for k, v in facts.items()))


if __name__ == "__main__":
    main()
