"""A synthetic stream of interactions and the broker it runs on: what the ingest benchmarks share."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from features.interactions import Interaction, Kind
from ingest.broker import Broker, embedded_broker, kafka_broker, kafka_home

_START = datetime(2026, 1, 1, tzinfo=UTC)


def interaction(n: int, users: int = 5_000, items: int = 2_000) -> Interaction:
    """Event ``n`` of the stream: every event_id once, users and items by a fixed stride, about 200 bytes."""
    rated = n % 3 == 0
    return Interaction(
        event_id=f"event-{n:09d}",
        user_id=f"user-{n * 7919 % users:06d}",
        item_id=f"item-{n * 104729 % items:06d}",
        kind=Kind.RATING if rated else Kind.IMPRESSION,
        occurred_at=_START + timedelta(seconds=n),
        value=float(1 + n % 5) if rated else None,
        request_id=None if rated else f"request-{n // 10:08d}",
        position=None if rated else 1 + n % 10,
    )


@contextlib.contextmanager
def broker_in(folder: Path) -> Iterator[Broker]:
    """A fresh broker: real Kafka where ``KAFKA_HOME`` names one, else the embedded one."""
    node = kafka_broker(folder) if kafka_home() else embedded_broker(folder)
    with node:
        yield node


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """``keep``, or a temporary folder that is removed."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def start_worker(
    home: Path, servers: str, log: Path, *arguments: str, **settings: str
) -> subprocess.Popen[bytes]:
    """An ``align3gr ingest`` process; ``settings`` are environment variables without their prefix."""
    environment = {
        **os.environ,
        "ALIGN3GR_HOME": str(home),
        "ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS": servers,
        **{f"ALIGN3GR_{name}": value for name, value in settings.items()},
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "align3gr", "--debug", "ingest", *arguments],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
