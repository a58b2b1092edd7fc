"""Settings of rounds, and of when they run."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .numbers import Count, Positive, Share


class RoundSettings(BaseModel):
    """What a round runs with, besides its stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Base of every random number of the rounds; a round adds its own number."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    """Where stages run: auto (a GPU when there is one), cpu, cuda, cuda:N."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0: as many as torch finds at the round's start. Kept for the round's resumes."""
    stop_share: Share = 0.05
    """Share of users, by hash, that only decide when a stage stops; used where ``patience`` is set."""


class ScheduleSettings(BaseModel):
    """When a round runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cron: str | None = None
    """Five-field cron expression in UTC; instead of ``interval``."""
    interval: Positive | None = None
    """Seconds between refreshes; none and no ``cron``: every six hours."""
    min_feedback: Annotated[int, Field(ge=0)] = 1000
    """Log rows with a level that must have landed since the last round's log version."""
    max_lag: Annotated[int, Field(ge=0)] | None = 10_000
    """Events waiting in Kafka above which a refresh waits; none: lag is not looked at."""
    retry: Positive = 60.0
    """Seconds after which a refresh that waited for lag, or a round that crashed, is looked at again."""
    attempts: Count = 3
    """Times that an unfinished round is started in all before it is given up."""
    keep_rounds: Count = 10
    """Ended rounds that keep their working files: reference scores, item lists, what a failed stage left. Of
    older ones the record stays: state, figures, decision, curves."""

    @model_validator(mode="after")
    def _one_trigger(self) -> Self:
        if self.cron is not None and self.interval is not None:
            raise ValueError("set cron or interval, not both")
        if self.cron is not None:
            from apscheduler.triggers.cron import CronTrigger

            CronTrigger.from_crontab(self.cron)
        return self
