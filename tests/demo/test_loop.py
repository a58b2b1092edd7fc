"""The demo's loop on a small world, in a process of its own: whole, stopped, killed and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest

from align3gr.demo.state import read_state
from features.log import FeedbackLog
from policies.ledger import PromotionLedger

PROGRAM = """
import sys, time, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
from align3gr.demo.defaults import DemoOptions
from align3gr.demo.loop import WorldDemo
from align3gr.demo.state import DemoState, read_state
from align3gr.demo.world import WorldSize

if __name__ == "__main__":
    import signal

    def end(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    home = Path(sys.argv[1])
    size = WorldSize(items=200, learners=240, evaluated=30, old_slates=6)
    options = DemoOptions(7, rounds=2, size=size, sft_epochs=1)
    state = read_state(home) or DemoState(options.as_dict(), time.time())
    state.write(home)
    WorldDemo(home, state, options, lambda what, done, total: print(what, flush=True)).run()
"""


def start(program: Path, home: Path) -> subprocess.Popen[str]:
    """The demo in a process of its own, one thread of torch: many run beside each other in a test run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.Popen(
        [sys.executable, str(program), str(home)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip


def until(process: subprocess.Popen[str], words: str) -> None:
    """Read what the demo says until it begins the part that ``words`` names."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    assert process.stderr is not None
    raise AssertionError(f"the demo ended before {words!r}: {process.stderr.read()[-2000:]}")


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]


def left_running(home: Path) -> list[str]:
    """Command lines of processes that name ``home``, and brokers of its cluster."""
    marks = [str(home)]
    facts = home / "broker" / "broker.json"
    if facts.exists():
        marks.append(json.loads(facts.read_text())["cluster_id"])
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if any(mark in command for mark in marks):
                found.append(command)
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "small_demo.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_loop_runs_and_survives_being_killed_in_every_part(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "world"
    for words in (
        "tokenize",
        "SFT",
        "round 1: recommend",
        "round 1: feedback",
        "round 1: hard",
        "round 2: easy",
    ):
        process = start(program, home)
        until(process, words)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    process = start(program, home)
    finish(process)
    state = read_state(home)
    assert state is not None
    assert state.finished
    assert len(state.learning) == 2
    assert state.random is not None
    assert state.oracle is not None
    assert state.frozen is not None
    assert state.random < state.oracle
    rounds = [
        json.loads((home / "rounds" / str(one.round_id) / "state.json").read_text()) for one in state.rounds
    ]
    assert [one["status"] for one in rounds] == ["finished", "finished"]
    assert len(list((home / "rounds").glob("r*"))) == 2, "no round was started twice"
    ledger = PromotionLedger(home / "ledger")
    assert ledger.anchor() == state.base
    assert ledger.reference() in {state.base, *(one.version for one in state.rounds)}
    # Each round's served events once, whatever was published again: ids repeat, readers keep one of each.
    files = FeedbackLog.open(home / "log").snapshot().files
    query = (
        "select count(distinct (user_id, event_id)) from read_parquet($files, hive_partitioning=true) "
        "where kind = 'served'"
    )
    served = duckdb.connect().execute(query, {"files": files}).fetchone()
    assert served == (2 * 2 * 240 * 10,), "rounds, slates, learners, places"
    time.sleep(1.0)
    assert left_running(home) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_demo_that_is_told_to_stop_leaves_nothing_running(program: Path, tmp_path: Path) -> None:
    home = tmp_path / "world"
    process = start(program, home)
    until(process, "tokenize")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert left_running(home) == []
