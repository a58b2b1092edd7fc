"""Serving while the reference moves: promotions, rollbacks and a corrupt candidate under load.

    python benchmarks/serving.py [--json] [--requests 10000] [--clients 8] [--items 2000] [--width 128]

Builds three policies of random weights and one whose weights are damaged, lands events of 500 users, lets
``align3gr features follow --once`` fill the online store, starts ``align3gr serve`` and an embedded broker
that takes what is served, and lets clients ask as fast as they are answered. Meanwhile the reference moves
every so many requests: promote, promote, rollback, try the damaged one, promote ... A response is *stale*
when it names a version that was not the reference at any moment of the 2 s before the client had it.
``--json``: the last line is one object [requests, failed, stale, p50_ms, p95_ms, ...].
"""

import argparse
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa

from features.interactions import Kind
from features.log import LOG_SCHEMA, FeedbackLog, offsets_app
from ingest.broker import Broker
from ingest.settings import KafkaSettings
from ingest.topics import create_topics
from policies.errors import PolicyRefused
from policies.ledger import LedgerEntry, PromotionLedger

USERS = 500
GRACE = timedelta(seconds=2)
KINDS = ("promote v2", "promote v3", "rollback", "corrupt", "promote v1", "promote v3", "rollback", "corrupt")


@dataclass(frozen=True)
class Response:
    """One answered (or failed) request."""

    received_at: datetime
    seconds: float
    version: str | None
    """None: failed."""
    items: int


@dataclass(frozen=True)
class Load:
    """What the clients saw, and how the reference moved meanwhile."""

    responses: list[Response]
    moves: list[LedgerEntry]
    refused: int
    """Corrupt candidates that could not be promoted."""
    seconds: float

    def stale(self) -> int:
        """Responses naming a version that was not the reference in the 2 s before they arrived."""
        return sum(
            response.version not in references_within(self.moves, response.received_at)
            for response in self.responses
            if response.version is not None
        )


def main() -> None:
    """Run, print a table, and with ``--json`` one object as the last line."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--requests", type=int, default=10_000)
    arguments.add_argument("--clients", type=int, default=8)
    arguments.add_argument("--items", type=int, default=2_000)
    arguments.add_argument("--width", type=int, default=128)
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1, help="torch threads of the server")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        build_policies(home, options.items, options.width, options.layers)
        land_users(home, options.items)
        with Broker("embedded", Path(scratch) / "broker") as broker:
            create_topics(KafkaSettings(bootstrap_servers=broker.bootstrap_servers))
            settings = {
                "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
                "ALIGN3GR_SERVER__THREADS": str(options.threads),
            }
            subprocess.run(
                [*align3gr(), "features", "follow", "--once"], env=environment(home, settings), check=True
            )
            with Server(home, settings) as server:
                load = drive(home, server.port, options.requests, options.clients)
                health = server.get("/health")
                metrics = server.text("/metrics")
    milliseconds = np.array([1000 * one.seconds for one in load.responses if one.version is not None])
    facts: dict[str, Any] = {
        "requests": len(load.responses),
        "failed": sum(one.version is None for one in load.responses),
        "stale": load.stale(),
        "p50_ms": round(float(np.percentile(milliseconds, 50)), 1),
        "p95_ms": round(float(np.percentile(milliseconds, 95)), 1),
        "requests_per_s": round(len(load.responses) / load.seconds, 1),
        "moves": len(load.moves) - 1,
        "corrupt_refused": load.refused,
        "short_lists": sum(one.items != 10 for one in load.responses if one.version is not None),
        "swaps": metric(metrics, "align3gr_policy_swaps_total"),
        "events_dropped": metric(metrics, 'align3gr_events_total{outcome="dropped"}'),
        "events_acknowledged": metric(metrics, 'align3gr_events_total{outcome="acknowledged"}'),
        "serving": health["policy_version"],
        "clients": options.clients,
        "threads": options.threads,
    }
    for name, value in facts.items():
        print(f"{name:<20} {value}", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(facts))


class Server:
    """``align3gr serve`` in a process of its own, on a port that is free."""

    def __init__(self, home: Path, settings: dict[str, str], command: Sequence[str] | None = None) -> None:
        """``command``: what to run in place of ``align3gr``."""
        self._command = command or align3gr()
        self._environment = environment(home, settings)
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def __enter__(self) -> "Server":
        self._process = subprocess.Popen(
            [*self._command, "serve", "--port", "0", "--json"],
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self._process.wait()}")
        self.port = int(json.loads(line)["address"].rpartition(":")[2])
        deadline = time.monotonic() + 30
        while True:
            try:
                self.text("/health/live")
                return self
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def text(self, path: str) -> str:
        """Body of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def get(self, path: str) -> dict[str, Any]:
        """JSON body of a GET."""
        found: dict[str, Any] = json.loads(self.text(path))
        return found


def drive(
    home: Path, port: int, requests: int, clients: int, moves: tuple[str, ...] = KINDS, user: str = "user-{}"
) -> Load:
    """Send ``requests`` from ``clients`` connections while the reference makes ``moves``, evenly spread."""
    ledger = PromotionLedger(home / "ledger")
    responses: list[Response] = []
    numbers = itertools.count()
    refused = 0

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (number := next(numbers)) < requests:
            responses.append(ask(connection, user.format(number % USERS)))
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for done, move in enumerate(moves, start=1):
        while len(responses) < done * requests // (len(moves) + 1):
            time.sleep(0.01)
        refused += make_move(home, ledger, move)
    for thread in threads:
        thread.join()
    return Load(responses, ledger.history(), refused, time.perf_counter() - started)


def make_move(home: Path, ledger: PromotionLedger, move: str) -> int:
    """One move as ``align3gr policy`` makes it: check the policy, then the ledger. 1 when it was refused."""
    from policies.policy import Policy

    if move == "rollback":
        ledger.rollback(who="benchmark", why="load")
        return 0
    version = "v4" if move == "corrupt" else move.split()[1]
    if version == ledger.reference():
        return 0
    try:
        Policy.load(home / "policies" / version)
    except PolicyRefused:
        return 1
    ledger.promote(version, expects=ledger.reference(), who="benchmark", why="load")
    return 0


def references_within(moves: list[LedgerEntry], at: datetime) -> set[str | None]:
    """Versions that were the reference at some moment of the 2 s before ``at``."""
    spans = [(move.at, move.reference) for move in moves]
    ends = [start for start, _ in spans[1:]] + [datetime.max.replace(tzinfo=UTC)]
    return {
        reference
        for (start, reference), end in zip(spans, ends, strict=True)
        if start <= at and end >= at - GRACE
    }


def build_policies(home: Path, items: int, width: int, layers: int) -> None:
    """v1, v2, v3 of random weights, v4 damaged after it was written; v1 promoted."""
    for number in range(1, 5):
        _write_random_policy(home / "policies" / f"v{number}", items, width, layers, number)
    weights = home / "policies" / "v4" / "model" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 0xFF
    weights.write_bytes(bytes(damaged))
    PromotionLedger(home / "ledger").promote("v1", expects=None, who="benchmark", why="first")


def land_users(home: Path, items: int) -> None:
    """500 users with 20 likes each, in the feedback log."""
    at = datetime.now(UTC) - timedelta(hours=1)
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for step, item in enumerate(rng.choice(items, size=20, replace=False)):
            rows.append(
                {
                    "event_id": f"{user}-{step}", "user_id": f"user-{user}", "item_id": f"item-{item}",
                    "kind": str(Kind.LIKE), "occurred_at": at + timedelta(seconds=step), "level": 1,
                    "rules": "r", "schema_version": "1.0", "arrived_at": at, "landed_at": at,
                    "landed_on": at.date(), "kafka_partition": 0, "kafka_offset": len(rows),
                }
            )  # fmt: skip
    log = FeedbackLog.open(home / "log")
    app = offsets_app("benchmark", "interactions", 0)
    log.transaction_version(app)
    log.append(pa.Table.from_pylist(rows, schema=LOG_SCHEMA), {app: len(rows) - 1})


def environment(home: Path, settings: dict[str, str]) -> dict[str, str]:
    """The environment of a command of ours on ``home``."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ALIGN3GR_")}
    return {**ours, "ALIGN3GR_HOME": str(home), "OMP_NUM_THREADS": "1", **settings}


def align3gr() -> list[str]:
    """The command line, run by this interpreter."""
    return [sys.executable, "-m", "align3gr"]


def metric(exposition: str, name: str) -> float:
    """One value of a Prometheus exposition; 0 for what was never counted."""
    for line in exposition.splitlines():
        if line.startswith(name + " "):
            return float(line.rpartition(" ")[2])
    return 0.0


def ask(connection: http.client.HTTPConnection, user: str) -> Response:
    """One request for ``user``; one that fails in any way has no version."""
    started = time.perf_counter()
    version, items = None, 0
    try:
        connection.request("GET", f"/recommendations?user_id={user}&k=10")
        answer = connection.getresponse()
        body = answer.read()
        if answer.status == 200:
            slate = json.loads(body)
            version, items = slate["policy_version"], len(slate["items"])
    except (OSError, http.client.HTTPException):
        connection.close()
    return Response(datetime.now(UTC), time.perf_counter() - started, version, items)


def _write_random_policy(directory: Path, items: int, width: int, layers: int, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from policies.codec import ScidCodec
    from policies.policy import write_policy
    from policies.prompt import extend_tokenizer

    sizes = (32, 32, 32)
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(32**3, size=items, replace=False), sizes), axis=1)
    codec = ScidCodec([f"item-{number}" for number in range(items)], codes, sizes, quantizer_hash="random")
    words = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    extend_tokenizer(tokenizer, codec)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    write_policy(
        directory,
        version=directory.name,
        model=model,
        tokenizer=tokenizer,
        codec=codec,
        popularity=codec.item_ids,
    )


if __name__ == "__main__":
    main()
