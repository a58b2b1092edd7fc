"""Where a case of bad input runs: a home of its own, and the command line as its user meets it.

A command runs in a process of its own. Those that need torch are forked from one process that has imported
it (``in_fork``), so that sixty cases cost seconds and not minutes; the slow run starts each from nothing.
What a case must not touch is compared as it lies on the disk: every row count, and every file.
"""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from ingest.settings import KafkaSettings

PRELOADED = ["tests.bad_input.imported"]
"""What the process that commands are forked from has imported; importing starts no thread."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *says: str) -> None:
        """Assert: exit code ``code``, one line on standard error, holding every one of ``says``."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert self.err.startswith("align3gr: "), self.err
        assert self.err.endswith("\n")
        for words in says:
            assert words in lines[0], (words, lines[0])
        assert "Traceback" not in self.out
        assert "--debug" not in lines[0], "an error that nobody foresaw"


@dataclass
class Running:
    """A command at work in a fork."""

    process: Any
    out: Path
    err: Path

    @property
    def alive(self) -> bool:
        return bool(self.process.is_alive())

    def interrupt(self) -> "Running":
        """Ctrl-C."""
        os.kill(self.process.pid, signal.SIGINT)
        return self

    def end(self) -> Done:
        """How it ended; killed when it does not."""
        self.process.join(120)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return Done(self.process.exitcode, self.out.read_text(), self.err.read_text())


@dataclass
class Place:
    """A folder with a settings file and a home; commands run in it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.folder / "var"

    def file(self, name: str, content: str | bytes) -> Path:
        """Write a file beside the home."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def set(self, **settings: object) -> None:
        """Settings by environment variable, KAFKA__TOPIC=... and the like."""
        self.environment |= {f"ALIGN3GR_{name}": str(value) for name, value in settings.items()}

    def use(self, kafka: KafkaSettings) -> None:
        """Point the commands at a broker."""
        self.set(
            KAFKA__BOOTSTRAP_SERVERS=kafka.bootstrap_servers,
            KAFKA__TOPIC=kafka.topic,
            KAFKA__DEAD_TOPIC=kafka.dead_topic,
            KAFKA__CONNECT_TIMEOUT_S=kafka.connect_timeout_s,
            INGEST__GROUP=kafka.topic,
            INGEST__SESSION_TIMEOUT_S=2,
            INGEST__LINGER_S=0.2,
        )

    def run(self, *arguments: str, before: Callable[[], object] | None = None) -> Done:
        """``align3gr ARGUMENTS`` from nothing; ``before`` runs in the new process."""
        done = subprocess.run(
            [sys.executable, "-m", "align3gr", *arguments],
            cwd=self.folder,
            env={**_environment(), **self.environment},
            capture_output=True,
            timeout=120,
            preexec_fn=before,
            stdin=subprocess.DEVNULL,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str) -> "Running":
        """``align3gr ARGUMENTS`` in a fork of a process that has imported torch, without waiting."""
        out, err = self.folder / ".out", self.folder / ".err"
        for left in (out, err):
            left.unlink(missing_ok=True)
        process = _forkserver().Process(
            target=_in_child, args=(self.folder, self.environment, list(arguments), out, err)
        )
        process.start()
        return Running(process, out, err)

    def in_fork(self, *arguments: str) -> Done:
        """The same, to its end."""
        return self.start(*arguments).end()

    def counts(self) -> dict[str, int]:
        """Rows of the log and the catalogue; datasets, policies, ledger entries and rounds."""
        return {
            "log": _rows(self.home / "log"),
            "catalogue": _rows(self.home / "catalogue"),
            **{
                name: len(list((self.home / name).glob(pattern)))
                for name, pattern in {
                    "datasets": "*",
                    "policies": "*",
                    "ledger": "*.json",
                    "rounds": "r*",
                    "codec": "*",
                    "sft": "*",
                }.items()
            },
        }

    def files(self, *, but: Iterable[str] = ()) -> dict[str, tuple[int, int]]:
        """Every file and folder of the home with size and time of change; ``but``: patterns left out."""
        skipped = [re.compile(pattern) for pattern in but]
        found = {}
        for path in sorted(self.home.rglob("*")):
            name = path.relative_to(self.home).as_posix()
            if not any(pattern.fullmatch(name) for pattern in skipped):
                seen = path.lstat()
                found[name] = (seen.st_size, seen.st_mtime_ns) if path.is_file() else (0, 0)
        return found


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ALIGN3GR_")}
    kept.pop("KAFKA_HOME", None)
    return {**kept, "OMP_NUM_THREADS": "1", "ALIGN3GR_POLICIES__REGISTRY__MLFLOW": "false"}


def _rows(table: Path) -> int:
    if not (table / "_delta_log").is_dir():
        return 0
    counts = pa.table(DeltaTable(table).get_add_actions(flatten=True)).column("num_records")
    return sum(counts.to_pylist())


def _forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _in_child(
    folder: Path, environment: Mapping[str, str], arguments: list[str], out: Path, err: Path
) -> None:
    """Turn this process into ``align3gr ARGUMENTS`` with its output in files."""
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(_environment_of_server() | dict(environment))
    sys.argv = ["align3gr", *arguments]
    from align3gr.__main__ import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _environment_of_server() -> dict[str, str]:
    return _environment()
