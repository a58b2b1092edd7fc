"""Settings of the store: levels, feedback log, queries, upkeep."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, model_validator

from .interactions import EARLIEST, MAX_EVENT_BYTES
from .levels import LevelRules


class DuckSettings(BaseModel):
    """What one DuckDB connection may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory_limit: str = "2GB"
    """Memory of one connection, in DuckDB's words; beyond it queries spill to ``temp_directory``."""
    threads: int | None = Field(None, ge=1)
    """Threads of one connection; none means every core of the machine."""
    temp_directory: Path | None = None
    """Where queries spill; none means the system's temporary directory."""


class UpkeepSettings(BaseModel):
    """Compaction and vacuum of the log, by one owner in the background."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_s: float = Field(60.0, gt=0)
    """Seconds between looks at the table."""
    compact_from_files: int = Field(50, ge=2)
    """Compact when at least this many small files have gathered."""
    target_file_bytes: int = Field(128 << 20, ge=1 << 20)
    """Size that compaction aims at."""
    retention_hours: int = Field(24, ge=0)
    """A file that no version needs any more is deleted after this many hours: readers may still hold it."""


class RetentionSettings(BaseModel):
    """How long feedback and what was made of it is kept; nothing ages out unless it is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_days: int | None = Field(None, ge=1)
    """Days, by landing, that the log's newest version holds; none: all. The newest day stays in any case."""
    dataset_days: int | None = Field(None, ge=1)
    """Days after which a dataset snapshot goes, unless a live policy learned from it; none: never. With it
    goes the hold on the version of the log that its manifest names."""


class OnlineSettings(BaseModel):
    """Feast: the online store the server reads, and how closely it follows the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Literal["sqlite", "redis"] = "sqlite"
    """Online store: SQLite under ``home/online`` (one machine), or Redis (server and follower anywhere)."""
    redis: str = "localhost:6379"
    """Feast's connection string of Redis: ``host:port[,password=...,ssl=true,db=0]``; commas separate."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Pause between two looks at the log's version (s)."""
    batch_users: Annotated[int, Field(ge=1)] = 2_000
    """Users pushed in one write to the online store."""
    query_users: Annotated[int, Field(ge=1)] = 20_000
    """Users whose values are worked out by one query; bounds the follower's memory."""
    export_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Resolution of the offline exports: one state of a user for each such slot of landing time (s);
    0 exports the state after every commit."""


class DatasetSettings(BaseModel):
    """Preference datasets and evaluation cases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window_s: float | None = Field(None, gt=0)
    """Only likes that arrived within this many seconds before the watermark become samples; none: all."""
    min_samples: int = Field(10, ge=1)
    """Fewer samples to train on, both stages together, are an error."""
    max_samples_per_user: int = Field(200, ge=1)
    """At most so many samples of one user in a stage, the latest likes: nobody may outweigh the rest."""
    prefer_own_slates: bool = False
    """Which likes that cap keeps: those on slates of the reference or a policy it descends from come before
    all others, then the latest; false: the latest."""
    recency_half_life_s: float | None = Field(None, gt=0)
    """A sample weighs half as much for every so many seconds that its like arrived before the watermark (at
    most the window's length, at most 20 half-lives); none, or a log without a watermark: all weigh 1."""
    replay_share: float = Field(0.0, ge=0, lt=1)
    """Share of a stage's samples whose likes arrived before the window, drawn by hash, against forgetting; of
    one user at most this share of ``max_samples_per_user`` (rounded up), beside those of the window. Without
    a window nothing is older. 0: none."""
    propensity_clip: float | None = Field(None, ge=1, le=1_000_000)
    """Weighs a sample of a sampled slate by 1 / propensity of the chosen item, at most this; normalised so
    that such samples weigh 1 on average, as all others do. None: off."""
    position_bias: float = Field(0.0, ge=0, le=4)
    """With ``propensity_clip``: users look at place k with probability (1/k) to this power, and the weight is
    1 / (propensity x that). 0: they look at every place."""
    max_cases_per_user: int = Field(50, ge=1)
    """At most so many evaluation cases of a kind for one user, the latest."""
    learn_from_unsigned: bool = False
    """Whether feedback under a request id that we did not sign is learned from."""
    duplicates_warning: float = Field(0.01, ge=0, le=1)
    """A share of repeated events above this is a warning: a client that sends a constant event_id."""
    rows_per_shard: int = Field(2_000_000, ge=1)
    """Events queried at a time: bounds the memory of a build. The rows do not depend on it."""

    @model_validator(mode="after")
    def _bias_needs_propensities(self) -> Self:
        if self.position_bias and self.propensity_clip is None:
            raise ValueError("position_bias weighs only with propensity_clip: set that too")
        return self

    @property
    def weighs(self) -> bool:
        """Whether samples carry a weight."""
        return self.recency_half_life_s is not None or self.propensity_clip is not None


class TrustSettings(BaseModel):
    """Which feedback is stored, marked and not learned from, by the server's records of what it served."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cross_user: bool = True
    """Mark feedback on a request that was served to others and not to its user. With a ``request_key`` the
    signature says so already."""
    max_feedback_age_s: float | None = Field(2_592_000.0, gt=0)
    """Mark feedback that arrives more than so many seconds after its slate: a request id used again."""
    positions: bool = True
    """Mark feedback at a place of a slate where its item did not stand."""
    off_slate: bool = False
    """Mark feedback on items that were not on the slate it names."""
    organic_until: AwareDatetime | None = None
    """Feedback that names no request is learned from only if it landed before; none: always. Set it to the
    day of the last import to take word only from who was served."""
    max_events_per_user_day: int | None = Field(None, ge=1)
    """Of one user's feedback that landed on one day (UTC) the first so many are learned from; none: all."""
    max_events_per_request: int | None = Field(1000, ge=1)
    """Of the feedback on one slate the first so many to land are learned from; none: all."""

    @property
    def marks(self) -> bool:
        """Whether any check against what was served is on."""
        aged = self.max_feedback_age_s is not None or self.organic_until is not None
        return aged or self.cross_user or self.positions or self.off_slate

    @property
    def caps(self) -> bool:
        """Whether any cap is on."""
        return self.max_events_per_user_day is not None or self.max_events_per_request is not None

    @classmethod
    def none(cls) -> "TrustSettings":
        """Everything that is signed, or names no request of ours, is learned from."""
        return cls(cross_user=False, max_feedback_age_s=None, positions=False, max_events_per_request=None)


class QualitySettings(BaseModel):
    """Bounds of the data a refresh may learn from; the last period against the trailing ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hold: bool = True
    """Whether a refresh on data outside of the bounds waits for a person; false: it is only reported."""
    period_s: float = Field(86_400.0, gt=0)
    """Seconds of a period, counted back from the watermark by arrival. A day: most feedback has its hours."""
    trailing: int = Field(7, ge=1, le=365)
    """Periods that the last one is compared with."""
    min_periods: int = Field(3, ge=1)
    """With fewer trailing periods that hold ``min_events``, nothing is compared."""
    min_events: int = Field(1000, ge=1)
    """Events (without ``served``) below which a period's shares say nothing."""
    least_volume: float = Field(0.2, ge=0, le=1)
    """Events, users and items of the period, each at least this share of the trailing median."""
    most_volume: float = Field(5.0, ge=1)
    """And at most this many times it."""
    most_shift: float = Field(0.2, gt=0, le=1)
    """Most that the shares of levels or of kinds may move: half the sum of absolute differences."""
    most_of_user: float = Field(0.1, gt=0, le=1)
    """One user's events stay below this share (and below five times an even share, where users are few)."""
    most_gain_of_item: float = Field(0.1, gt=0, le=1)
    """Most that one item's share of the likes may rise."""
    most_likes_only: float = Field(0.03, gt=0, le=1)
    """Most that the share of users may rise who send ten or more levels, all of them likes."""
    likes_only_client: float = Field(0.05, gt=0, le=1)
    """A client (``source``) with at least this share of the events that has come to send only likes is out
    of bounds."""
    propensity_factor: float = Field(5.0, ge=1)
    """Most that the mean propensity may rise or fall by."""


class FeatureSettings(BaseModel):
    """The feedback log, its queries and its upkeep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: LevelRules = LevelRules()
    """How events become feedback levels."""
    request_key: SecretStr | None = None
    """Key that signs request ids. The server signs, the ingest workers verify: the same for both."""
    earliest_event: AwareDatetime = EARLIEST
    """Events that occurred before are refused as absurd."""
    max_event_bytes: int = Field(MAX_EVENT_BYTES, ge=256)
    """Events with more bytes are refused as oversized."""
    checkpoint_interval: int = Field(50, ge=1)
    """Commits between two checkpoints of a new log: opening it reads one checkpoint and fewer commits."""
    attribution_window_s: float = Field(1800.0, ge=0)
    """Seconds after which an impression without anything stronger is neutral."""
    history_length: int = Field(20, ge=1)
    """Items in a prompt's history."""
    history_look_back: int = Field(40, ge=1)
    """Engaged events looked at to find them: bounds the query."""
    max_rejected: int = Field(20, ge=1, le=20)
    """Rejected items of one preference sample (the paper's 20)."""
    trust: TrustSettings = TrustSettings()
    """Feedback that is marked and not learned from."""
    quality: QualitySettings = QualitySettings()
    """Bounds of the data a refresh learns from."""
    dataset: DatasetSettings = DatasetSettings()
    """Preference datasets and evaluation cases."""
    duck: DuckSettings = DuckSettings()
    """Limits of a query."""
    upkeep: UpkeepSettings = UpkeepSettings()
    """Compaction and vacuum."""
    retention: RetentionSettings = RetentionSettings()
    """What ages out, and when."""
    online: OnlineSettings = OnlineSettings()
    """Feature store for serving."""

    @property
    def request_key_bytes(self) -> bytes | None:
        """The signing key, or None when feedback is not signed."""
        return self.request_key.get_secret_value().encode() if self.request_key else None
