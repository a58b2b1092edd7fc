"""When rounds run: the real APScheduler under a clock that tests move, real leases, real processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import time_machine
from apscheduler.events import EVENT_JOB_EXECUTED, EVENT_JOB_MAX_INSTANCES, EVENT_JOB_SUBMITTED, JobEvent
from apscheduler.schedulers.background import BackgroundScheduler
from pydantic import ValidationError

from trainer.lease import Lease, RoundRunning
from trainer.round_state import RoundsTable, RoundState, UnknownRound, ended
from trainer.schedule import Scheduler, Surroundings
from trainer.settings import ScheduleSettings

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SETTINGS = ScheduleSettings(interval=3600, min_feedback=100, max_lag=1000, retry=60)


@dataclass
class World:
    """What the scheduler sees: a log that grows, a lag, and rounds as long as the test lets them be."""

    table: RoundsTable
    feedback: int = 0
    lag: int | None = 0
    leaves_unfinished: bool = False
    runs: list[str | None] = field(default_factory=list)
    upkeeps: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def surroundings(self) -> Surroundings:
        return Surroundings(
            feedback=lambda: self.feedback,
            lag=lambda: self.lag,
            run_round=self.run_round,
            upkeep=self.upkeep,
            clock=lambda: datetime.now(UTC),
        )

    def upkeep(self) -> None:
        self.upkeeps += 1

    def run_round(self, resume: str | None) -> int:
        """A round's process, as far as the scheduler can tell: its row in the table, and an exit code."""
        self.runs.append(resume)
        state = self.table.read(resume) if resume else self.table.create(a_state(self.feedback))
        state = self.table.write(replace(state, attempts=state.attempts + 1))
        self.gate.wait(20)
        if self.leaves_unfinished:
            return -9
        self.table.write(ended(state, "finished", datetime.now(UTC), outcome="promoted", message="better"))
        return 0


def a_state(feedback: int = 0) -> Callable[[str, int], RoundState]:
    return lambda round_id, number: RoundState(
        round_id=round_id, number=number, seed=1, device="cpu", threads=1, parent="v1", log_version=3,
        feedback=feedback, started_at=datetime.now(UTC).isoformat(), settings={},
    )  # fmt: skip


class Clockwork:
    """A running scheduler whose clock stands still until ``forward``; it counts what APScheduler reports."""

    def __init__(self, scheduler: Scheduler, traveller: time_machine.Traveller) -> None:
        self._traveller = traveller
        self.looked = self.submitted = self.done = 0
        self.jobs = BackgroundScheduler()
        scheduler.attach(self.jobs, upkeep_every_s=1e9)
        self.jobs.add_listener(
            self._count, EVENT_JOB_SUBMITTED | EVENT_JOB_EXECUTED | EVENT_JOB_MAX_INSTANCES
        )
        self.jobs.start()
        assert until(lambda: self.looked >= 1), "the first run is due at the start"

    def forward(self, by: timedelta) -> None:
        """Move the clock past a time on the timetable, until APScheduler has acted on it."""
        before = self.looked
        self._traveller.shift(by)
        self.jobs.wakeup()
        assert until(lambda: self.looked > before)

    def finish(self) -> None:
        """Wait until no job runs."""
        assert until(lambda: self.done == self.submitted)

    def _count(self, event: JobEvent) -> None:
        self.done += event.code == EVENT_JOB_EXECUTED
        self.submitted += event.code == EVENT_JOB_SUBMITTED
        self.looked += event.code != EVENT_JOB_EXECUTED


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(START, tick=False) as traveller:
        yield traveller


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(RoundsTable(tmp_path / "rounds"))


@pytest.fixture
def started(world: World, clock: time_machine.Traveller) -> Iterator[Callable[..., Clockwork]]:
    running: list[Clockwork] = []

    def start(settings: ScheduleSettings = SETTINGS) -> Clockwork:
        running.append(Clockwork(Scheduler(world.table, settings, world.surroundings()), clock))
        return running[-1]

    yield start
    world.gate.set()
    for clockwork in running:
        clockwork.jobs.shutdown()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait in real time (monotonic: the wall clock is the test's) until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


def test_fires_only_above_the_minimum_feedback(world: World, started: Callable[..., Clockwork]) -> None:
    world.feedback = 99
    clockwork = started()
    for _ in range(3):
        clockwork.finish()
        clockwork.forward(timedelta(hours=1))
    clockwork.finish()
    assert world.runs == []
    world.feedback = 100
    clockwork.forward(timedelta(hours=1))
    clockwork.finish()
    assert len(world.runs) == 1
    # Counted since that round's log version, not from zero.
    world.feedback = 199
    clockwork.forward(timedelta(hours=1))
    clockwork.finish()
    assert len(world.runs) == 1
    world.feedback = 200
    clockwork.forward(timedelta(hours=1))
    clockwork.finish()
    assert len(world.runs) == 2


def test_refuses_overlap_while_a_round_of_its_own_runs(
    world: World, started: Callable[..., Clockwork]
) -> None:
    world.feedback = 1000
    world.gate.clear()
    clockwork = started()
    assert until(lambda: len(world.runs) == 1)
    for _ in range(3):
        world.feedback += 1000
        clockwork.forward(timedelta(hours=1))
    assert len(world.runs) == 1
    world.gate.set()
    clockwork.finish()
    clockwork.forward(timedelta(hours=1))
    clockwork.finish()
    assert len(world.runs) == 2


def test_the_canary_is_looked_at_while_a_round_runs_and_after_a_look_that_failed(
    world: World, clock: time_machine.Traveller
) -> None:
    looks: list[datetime] = []

    def look() -> None:
        looks.append(datetime.now(UTC))
        if len(looks) == 1:
            raise OSError("the log cannot be read")

    world.feedback = 1000
    world.gate.clear()
    surroundings = replace(world.surroundings(), canary=look)
    clockwork = Clockwork(Scheduler(world.table, SETTINGS, surroundings), clock)
    try:
        assert until(lambda: len(world.runs) == 1)
        for number in (1, 2):
            clockwork.forward(timedelta(minutes=2))
            # done, not begun: a job that still runs is not run again
            assert until(lambda wanted=number: clockwork.done == wanted)  # type: ignore[misc]
        assert (len(looks), len(world.runs)) == (2, 1)
    finally:
        world.gate.set()
        clockwork.jobs.shutdown()


def test_refuses_overlap_with_a_round_that_another_process_holds(world: World) -> None:
    world.feedback = 1000
    scheduler = Scheduler(world.table, SETTINGS, world.surroundings())
    with another_process_holding(world.table.directory):
        found = scheduler.refresh()
        assert (found.outcome, found.again) == ("waiting", True)
        assert "is running" in found.why
    assert scheduler.refresh().outcome == "started"


def test_missed_runs_coalesce_into_one(world: World, started: Callable[..., Clockwork]) -> None:
    world.feedback = 1000
    clockwork = started()
    clockwork.finish()
    assert len(world.runs) == 1
    world.feedback = 100_000
    # A machine that slept for ten intervals, far past any misfire grace time.
    clockwork.forward(timedelta(hours=10, minutes=5))
    clockwork.finish()
    assert len(world.runs) == 2
    assert clockwork.submitted == 2


def test_a_run_missed_while_no_scheduler_ran_is_made_up_for_at_start(
    world: World, clock: time_machine.Traveller
) -> None:
    world.feedback = 1000
    world.run_round(None)
    scheduler = Scheduler(world.table, SETTINGS, world.surroundings())
    clock.shift(timedelta(minutes=20))
    assert scheduler.first_run() == START + timedelta(hours=1)
    clock.shift(timedelta(hours=5))
    assert scheduler.first_run() == START + timedelta(hours=5, minutes=20)


def test_cron_is_read_in_utc_and_missed_nights_are_made_up_for(
    world: World, clock: time_machine.Traveller
) -> None:
    nightly = ScheduleSettings(cron="30 3 * * *")
    scheduler = Scheduler(world.table, nightly, world.surroundings())
    assert scheduler.first_run() == datetime(2026, 3, 3, 3, 30, tzinfo=UTC)
    world.run_round(None)
    clock.shift(timedelta(days=2))
    assert scheduler.first_run() == START + timedelta(days=2)


def test_a_refresh_waits_while_lag_is_too_high_and_looks_again_soon(
    world: World, started: Callable[..., Clockwork]
) -> None:
    world.feedback, world.lag = 1000, 5000
    clockwork = started()
    clockwork.finish()
    assert world.runs == []
    world.lag = 10
    clockwork.forward(timedelta(seconds=61))
    clockwork.finish()
    assert len(world.runs) == 1


def test_unknown_lag_waits_and_says_why(world: World) -> None:
    world.feedback, world.lag = 1000, None
    found = Scheduler(world.table, SETTINGS, world.surroundings()).refresh()
    assert found.outcome == "waiting"
    assert "broker" in found.why
    unasked = SETTINGS.model_copy(update={"max_lag": None})
    assert Scheduler(world.table, unasked, world.surroundings()).refresh().outcome == "started"


def test_a_crashed_round_is_resumed_and_given_up_after_its_attempts(world: World) -> None:
    world.feedback, world.leaves_unfinished = 1000, True
    scheduler = Scheduler(world.table, SETTINGS, world.surroundings())
    outcomes = [scheduler.refresh().outcome for _ in range(4)]
    assert outcomes == ["started", "resumed", "resumed", "waiting"]
    assert world.runs == [None, "r0001", "r0001"]
    given_up = world.table.read("r0001")
    assert given_up.status == "failed"
    assert "given up after 3 attempts" in str(given_up.message)


def test_upkeep_runs_between_rounds_only(world: World) -> None:
    scheduler = Scheduler(world.table, SETTINGS, world.surroundings())
    with another_process_holding(world.table.directory):
        scheduler._upkeep_job()
        assert world.upkeeps == 0
    scheduler._upkeep_job()
    assert world.upkeeps == 1


def test_upkeep_tidies_old_rounds_and_leaves_their_record(world: World) -> None:
    """Of five rounds the second is unfinished; with two to keep, the first and the third are tidied."""
    record = {"state.json", "gate_input.json", "decision.json", "easy/metrics.jsonl", "run.jsonl"}
    working = {
        "eligible.json",
        "easy/references-1.safetensors",
        "easy/policy/manifest.json",
        "codec/a/b.json",
    }
    for number in range(1, 6):
        state = world.table.create(a_state())
        for name in (record | working) - {"state.json"}:
            file = world.table.path(state.round_id) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        if number != 2:
            status = "failed" if number == 3 else "finished"
            world.table.write(ended(state, status, START, outcome=None, message="over"))
    scheduler = Scheduler(world.table, SETTINGS.model_copy(update={"keep_rounds": 2}), world.surroundings())
    before = world.table.all()
    for _ in range(2):  # the second finds nothing more to do
        scheduler._upkeep_job()
        for state in before:
            directory = world.table.path(state.round_id)
            left = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
            assert left == (record if state.number in (1, 3) else record | working)
            assert (directory / "codec").exists() == (state.number not in (1, 3))
    assert world.table.all() == before
    assert world.table.tidy(2) == []
    assert world.table.tidy(1) == ["r0004"]


def test_a_look_that_fails_does_not_end_the_timetable(
    world: World, started: Callable[..., Clockwork]
) -> None:
    looks: list[int] = []

    def feedback() -> int:
        looks.append(1)
        if len(looks) == 1:
            raise OSError("the disk is away")
        return 1000

    surroundings = replace(world.surroundings(), feedback=feedback)
    world.surroundings = lambda: surroundings  # type: ignore[method-assign]
    clockwork = started()
    clockwork.finish()
    assert len(looks) == 1
    clockwork.forward(timedelta(seconds=61))
    clockwork.finish()
    assert len(world.runs) == 1


def test_a_round_whose_state_is_unreadable_is_passed_over(world: World) -> None:
    broken = world.table.directory / "r0001"
    broken.mkdir(parents=True)
    (broken / "state.json").write_text("{torn")
    world.feedback = 1000
    assert Scheduler(world.table, SETTINGS, world.surroundings()).refresh().outcome == "started"
    assert [state.round_id for state in world.table.all()] == ["r0002"]


def test_the_lease_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    lease = Lease(tmp_path)
    assert not lease.is_held()
    with another_process_holding(tmp_path) as holder:
        assert lease.is_held()
        assert lease.holder() == holder.pid
        with pytest.raises(RoundRunning, match="already running"), lease.held():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not lease.is_held()
        with lease.held():
            assert lease.is_held()
    assert not lease.is_held()


def test_an_orphan_of_a_killed_scheduler_still_holds_the_lease(tmp_path: Path) -> None:
    """A scheduler process starts a round's process and is killed: a second scheduler must see the round."""
    rounds = tmp_path / "rounds"
    round_code = (
        "import sys,time; from pathlib import Path; from trainer.lease import Lease\n"
        "with Lease(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(60)"
    )
    scheduler_code = (
        "import subprocess,sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]]);"
        "print(p.pid, flush=True); p.wait()"
    )
    scheduler = subprocess.Popen(
        [sys.executable, "-c", scheduler_code, str(rounds), round_code], stdout=subprocess.PIPE, text=True
    )
    assert scheduler.stdout is not None
    orphan = int(scheduler.stdout.readline())
    try:
        assert scheduler.stdout.readline().strip() == "held"
        scheduler.send_signal(signal.SIGKILL)
        scheduler.wait()
        world = World(RoundsTable(rounds), feedback=10_000)
        found = Scheduler(world.table, SETTINGS, world.surroundings()).refresh()
        assert found.outcome == "waiting"
        assert f"process {orphan}" in found.why
        assert world.runs == []
    finally:
        os.kill(orphan, signal.SIGKILL)
        scheduler.stdout.close()
    assert until(lambda: not Lease(rounds).is_held())
    assert Scheduler(world.table, SETTINGS, world.surroundings()).refresh().outcome == "started"


def test_rounds_get_dense_numbers_and_states_are_replaced_whole(tmp_path: Path) -> None:
    table = RoundsTable(tmp_path / "rounds")
    assert table.last() is None
    first, second = table.create(a_state()), table.create(a_state())
    assert [first.round_id, second.round_id] == ["r0001", "r0002"]
    assert table.finish_step(second, "dataset", {"dataset_id": "d"}).steps == {"dataset": {"dataset_id": "d"}}
    assert table.last() == table.read("r0002")
    assert sorted(path.name for path in table.path("r0002").iterdir()) == ["state.json"]
    with pytest.raises(UnknownRound, match="the last ones are: r0001, r0002"):
        table.read("r0009")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cron": "61 * * * *"}, "higher than the maximum"),
        ({"cron": "nonsense"}, "Wrong number of fields"),
        ({"cron": "* * * * *", "interval": 5}, "not both"),
        ({"interval": 0}, "greater than 0"),
    ],
)
def test_an_impossible_timetable_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ScheduleSettings.model_validate(values)


class another_process_holding:  # noqa: N801 - reads as a phrase
    """``with another_process_holding(directory) as process``: a real process holds the lease."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> subprocess.Popen[str]:
        code = (
            "import sys; from pathlib import Path; from trainer.lease import Lease\n"
            "with Lease(Path(sys.argv[1])).held(): print('held', flush=True); sys.stdin.read()"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(self._directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "held"
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def test_a_refresh_on_data_that_left_its_bounds_holds_and_says_why(tmp_path: Path) -> None:
    world, wrong = World(RoundsTable(tmp_path), feedback=500), ["user u1 sent 40% of the events"]
    surroundings = replace(world.surroundings(), quality=lambda: wrong)
    scheduler = Scheduler(world.table, SETTINGS, surroundings)
    found = scheduler.refresh()
    assert (found.outcome, world.runs) == ("held", [])
    assert "user u1 sent 40% of the events" in found.why
    assert "align3gr quality accept" in found.why
    wrong.clear()
    assert scheduler.refresh().outcome == "started"
