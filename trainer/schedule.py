"""When a round runs: by cron or interval, and only when enough new feedback has landed.

One idea: the timetable lives in memory (APScheduler), what ran when is read from the rounds table, and the
lease that forbids two rounds belongs to the round's own process. So this process may be killed at any moment:
the round it started goes on, and the next scheduler finds it running, finished or in need of a resume.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from .data_hold import WAY_OUT
from .lease import Lease
from .round_state import RoundsTable, RoundState, ended
from .settings import ScheduleSettings

log = logging.getLogger(__name__)

DEFAULT_INTERVAL_S = 6 * 3600.0
_RETRY_JOB = "refresh-retry"
_CANARY_JOB = "canary"


@dataclass(frozen=True)
class Refresh:
    """What one look at the state of things came to."""

    outcome: Literal["started", "resumed", "waiting", "held"]
    why: str
    exit_code: int | None = None
    """Of the round's process, when there was one."""
    again: bool = False
    """Whether to look again before the next time on the timetable."""


@dataclass(frozen=True)
class Surroundings:
    """What the scheduler asks and sets off; the command line puts the real ones in."""

    feedback: Callable[[], int]
    """Log rows with a level, now."""
    lag: Callable[[], int | None]
    """Events waiting in Kafka; none: it cannot be told."""
    run_round: Callable[[str | None], int]
    """Run a round in a process of its own (resume the one named), wait for it, give its exit code."""
    upkeep: Callable[[], object]
    """Compact and vacuum the store once."""
    clock: Callable[[], datetime]
    canary: Callable[[], object] | None = None
    """Look at the canary once and act on it; none: this scheduler does not."""
    quality: Callable[[], Sequence[str]] = tuple
    """What is wrong with the data and not accepted by a person, a sentence each."""


class Scheduler:
    """Decides about rounds. Its jobs run one after another, never two at once."""

    def __init__(self, rounds: RoundsTable, settings: ScheduleSettings, surroundings: Surroundings) -> None:
        self.rounds = rounds
        self.settings = settings
        self.surroundings = surroundings
        self._lease = Lease(rounds.directory)
        self._jobs: Any = None

    def attach(self, jobs: Any, *, upkeep_every_s: float, canary_every_s: float = 60.0) -> None:
        """Put the refresh and the upkeep on ``jobs``, an APScheduler scheduler that is not started yet.

        Missed runs coalesce into one however late (``misfire_grace_time=None``: the default of one second
        would drop them); one worker runs both jobs, so upkeep stands between rounds. The canary has
        a worker of its own: it is not left alone for the hours that a round may take.
        """
        from apscheduler.executors.pool import ThreadPoolExecutor
        from apscheduler.triggers.interval import IntervalTrigger

        rules = {"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        jobs.configure(
            executors={name: ThreadPoolExecutor(max_workers=1) for name in ("default", _CANARY_JOB)},
            job_defaults=rules,
            timezone=UTC,
        )
        self._jobs = jobs
        jobs.add_job(self._refresh_job, self.trigger(), id="refresh", next_run_time=self.first_run())
        jobs.add_job(self._upkeep_job, IntervalTrigger(seconds=upkeep_every_s, timezone=UTC), id="upkeep")
        if self.surroundings.canary is not None:
            every = IntervalTrigger(seconds=canary_every_s, timezone=UTC)
            jobs.add_job(self._canary_job, every, id=_CANARY_JOB, executor=_CANARY_JOB)

    def trigger(self) -> Any:
        """The timetable as an APScheduler trigger, in UTC."""
        from apscheduler.triggers.cron import CronTrigger
        from apscheduler.triggers.interval import IntervalTrigger

        if self.settings.cron is not None:
            return CronTrigger.from_crontab(self.settings.cron, timezone=UTC)
        seconds = self.settings.interval or DEFAULT_INTERVAL_S
        return IntervalTrigger(seconds=seconds, start_date=self._interval_start(seconds), timezone=UTC)

    def first_run(self) -> datetime:
        """The first run of this process: now when one was missed while no scheduler ran, else as planned."""
        now = self.surroundings.clock()
        last = self._last_start()
        if last is None and self.settings.cron is None:
            return now
        planned: datetime = self.trigger().get_next_fire_time(None, last or now)
        return max(planned, now)

    def refresh(self) -> Refresh:
        """Look once: resume what was left unfinished, run a round if enough is new, else wait and say why."""
        if self._lease.is_held():
            return Refresh("waiting", f"a round is running (process {self._lease.holder()})", again=True)
        last = self.rounds.last()
        if last is not None and last.status == "running":
            if last.attempts < self.settings.attempts:
                return self._run(last.round_id, f"round {last.round_id} was left unfinished")
            self._give_up(last)
        lag = self._excess_lag()
        if lag is not None:
            return Refresh("waiting", lag, again=True)
        total = self.surroundings.feedback()
        seen = last.feedback if last is not None and last.feedback <= total else 0
        if total - seen < max(1, self.settings.min_feedback):
            return Refresh(
                "waiting", f"{total - seen} new events with a level, {self.settings.min_feedback} are needed"
            )
        if wrong := self.surroundings.quality():
            return Refresh("held", f"the data left its bounds: {'; '.join(wrong)}; {WAY_OUT}")
        return self._run(None, f"{total - seen} new events with a level")

    def _run(self, resume: str | None, why: str) -> Refresh:
        log.info("round start resume=%s why=%s", resume, why)
        code = self.surroundings.run_round(resume)
        log.info("round end resume=%s exit_code=%d", resume, code)
        last = self.rounds.last()
        unfinished = last is not None and last.status == "running"
        return Refresh("resumed" if resume else "started", why, code, again=unfinished)

    def _give_up(self, state: RoundState) -> None:
        message = f"given up after {state.attempts} attempts; see what it logged, then start a new round"
        log.error("round given up round=%s attempts=%d", state.round_id, state.attempts)
        self.rounds.write(ended(state, "failed", self.surroundings.clock(), outcome=None, message=message))

    def _excess_lag(self) -> str | None:
        """Why the refresh must wait for ingest; none when it need not."""
        if self.settings.max_lag is None:
            return None
        lag = self.surroundings.lag()
        if lag is None:
            return "the lag of ingest cannot be told: is the broker up?"
        if lag > self.settings.max_lag:
            return f"{lag} events wait in Kafka, at most {self.settings.max_lag} are allowed"
        return None

    def _refresh_job(self) -> None:
        """A job's edge: whatever a look fails with is logged and the timetable goes on."""
        try:
            found = self.refresh()
        except Exception:
            log.exception("refresh failed retry_s=%g", self.settings.retry)
            found = Refresh("waiting", "the look itself failed", again=True)
        log.info("refresh outcome=%s exit_code=%s why=%s", found.outcome, found.exit_code, found.why)
        if found.again:
            at = self.surroundings.clock() + timedelta(seconds=self.settings.retry)
            self._jobs.add_job(self._refresh_job, "date", run_date=at, id=_RETRY_JOB, replace_existing=True)

    def _upkeep_job(self) -> None:
        if self._lease.is_held():
            log.info("upkeep outcome=waiting why=a round is running")
            return
        try:
            self.surroundings.upkeep()
            tidied = self.rounds.tidy(self.settings.keep_rounds)
        except Exception:
            log.exception("upkeep failed")
        else:
            if tidied:
                log.info("rounds tidied rounds=%s", ",".join(tidied))

    def _canary_job(self) -> None:
        """A job's edge: the next look makes up for one that failed."""
        if self.surroundings.canary is not None:
            try:
                self.surroundings.canary()
            except Exception:
                log.exception("canary look failed")

    def _last_start(self) -> datetime | None:
        last = self.rounds.last()
        return datetime.fromisoformat(last.started_at) if last is not None else None

    def _interval_start(self, seconds: float) -> datetime:
        """Intervals count on from the last round's start, whichever process ran it."""
        last = self._last_start()
        now = self.surroundings.clock()
        return last + timedelta(seconds=seconds) if last is not None else now
