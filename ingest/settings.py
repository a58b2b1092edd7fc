"""Settings of the way in: how to reach Kafka, and how workers batch, time out and refuse.

What a level means, how large an event may be and the signing key are not here: they belong to the store
(``features.settings.FeatureSettings``), and a worker is given them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator


class KafkaSettings(BaseModel):
    """How to reach the cluster; security settings are passed to the client as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bootstrap_servers: str = "127.0.0.1:9092"
    """host:port of one or more brokers, separated by commas."""
    topic: str = "interactions"
    """The topic that interactions are published to, keyed by user_id."""
    dead_topic: str = "interactions.dead"
    """The topic that takes what cannot be accepted, with the reason and the original bytes."""
    partitions: int = Field(4, ge=1)
    """Partitions of a topic that ``align3gr broker topics`` creates; they bound the number of workers."""
    replication_factor: int = Field(1, ge=1)
    """Copies of each partition of a topic that we create; 3 on a cluster that must survive a broker."""
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """Protocol spoken to the brokers."""
    sasl_mechanism: Literal["PLAIN", "GSSAPI", "OAUTHBEARER", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """SASL mechanism, with a SASL protocol."""
    sasl_plain_username: str | None = None
    """User name for PLAIN and SCRAM."""
    sasl_plain_password: SecretStr | None = None
    """Password for PLAIN and SCRAM; give it by environment variable."""
    ssl_cafile: str | None = None
    """File of the certificate authority, PEM."""
    ssl_certfile: str | None = None
    """File of the client's certificate, PEM."""
    ssl_keyfile: str | None = None
    """File of the client's private key, PEM."""
    ssl_password: SecretStr | None = None
    """Password of the private key."""
    ssl_check_hostname: bool = True
    """Whether the broker's certificate must name the host we called."""
    connect_timeout_s: float = Field(10.0, gt=0)
    """Seconds a client waits for a first answer before it says that no broker is there."""
    delivery_timeout_s: float = Field(60.0, gt=0)
    """Seconds after which an event that no broker acknowledged is reported as undelivered."""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "lz4"
    """Codec of the batches that our producers send."""
    client_options: dict[str, Any] = {}
    """Further options of kafka-python, passed to every client as they are."""

    @field_validator("bootstrap_servers")
    @classmethod
    def _names_a_broker(cls, servers: str) -> str:
        if not servers.replace(",", "").strip():
            raise ValueError("name at least one broker as host:port")
        return servers

    def connection(self) -> dict[str, Any]:
        """Arguments that every kafka-python client takes: addresses, security, then the further options."""
        options: dict[str, Any] = {
            "bootstrap_servers": [part.strip() for part in self.bootstrap_servers.split(",") if part.strip()],
            "security_protocol": self.security_protocol,
            "ssl_check_hostname": self.ssl_check_hostname,
            "bootstrap_timeout_ms": int(self.connect_timeout_s * 1000),
            # A broker that comes back after 3.5 s should be found at once, not after a 30 s back-off.
            "reconnect_backoff_max_ms": 1000,
        }
        for name in ("sasl_mechanism", "sasl_plain_username", "ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        for name in ("sasl_plain_password", "ssl_password"):
            secret: SecretStr | None = getattr(self, name)
            if secret is not None:
                options[name] = secret.get_secret_value()
        return {**options, **self.client_options}


class RatingSettings(BaseModel):
    """Reviews without stars, rated 1 to 5 by what they say (``align3gr rate``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str = "align3gr-rate"
    """Consumer group that the rating workers share; their progress is kept under this name."""
    rater: Literal["lexicon", "classifier", "causal"] = "lexicon"
    """What reads the words: VADER's lexicon (English), or a local Hugging Face model: a text classifier, or a
    causal model that is asked for a number."""
    kinds: tuple[Literal["review", "comment"], ...] = ("review",)
    """Kinds of events that are rated where they carry words and no value."""
    bounds: tuple[float, float, float, float] = (-0.08, -0.01, 0.08, 0.24)
    """Lexicon: the mean sentiment of a text's sentences (-1 .. 1) from which its rating is 2, 3, 4 and 5."""
    directory: Path | None = None
    """Models: the local directory of configuration, tokenizer and safetensors; nothing is downloaded."""
    labels: dict[str, Annotated[float, Field(ge=1, le=5)]] = {}
    """Classifier: the stars that each label means; needed only where its names do not say so."""
    prompt: str | None = None
    """Causal model: the question, with ``{review}`` where the words go; none: that of ``ingest.rating``."""
    answer: Literal["most_likely", "expected"] = "most_likely"
    """Models: the most likely rating, or the mean over the five, rounded."""
    device: str = "cpu"
    """Models: where they run, as torch names it."""
    batch_reviews: int = Field(64, ge=1)
    """Reviews that are rated and published at once; what a crash lets another worker do again."""
    max_chars: int = Field(4000, ge=1)
    """Characters of a review that are read, from its beginning."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if list(self.bounds) != sorted(self.bounds):
            raise ValueError("bounds must not fall; two equal ones leave the rating between them out")
        if self.rater != "lexicon" and self.directory is None:
            raise ValueError(f"rater {self.rater} needs directory, the local directory of its model")
        if self.prompt is not None and "{review}" not in self.prompt:
            raise ValueError("prompt must say with {review} where the words go")
        return self


class IngestSettings(BaseModel):
    """Workers, batches and dead letters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str = "align3gr-ingest"
    """Consumer group that the workers share; one group per feedback log."""
    batch_rows: int = Field(20_000, ge=1)
    """Rows that make a worker append at once: commits cost 5 to 50 ms each, so large is cheap."""
    linger_s: float = Field(1.0, gt=0)
    """Seconds after which a smaller batch is appended: the most that ingest adds to an event's way."""
    poll_records: int = Field(10_000, ge=1)
    """Records that one poll returns at most."""
    session_timeout_s: float = Field(6.0, ge=1.0)
    """Seconds without a heartbeat after which a worker's partitions move to another one."""
    heartbeat_s: float = Field(0.5, gt=0)
    """Seconds between heartbeats; at most a third of the session timeout."""
    watermark_interval_s: float = Field(2.0, gt=0)
    """Seconds between advances of the watermark of partitions that are caught up and idle."""
    lost_offsets: Literal["stop", "skip"] = "stop"
    """Events that the topic dropped before they landed: stop and say so, or say so and go on behind them."""

    rating: RatingSettings = RatingSettings()
    """Ratings of reviews by what they say."""

    def consumer(self) -> dict[str, Any]:
        """What a worker asks of its client, the group apart: large fetches, no opinion on where to begin."""
        return {
            "enable_auto_commit": False,
            "auto_offset_reset": "none",
            "session_timeout_ms": int(self.session_timeout_s * 1000),
            "heartbeat_interval_ms": int(self.heartbeat_s * 1000),
            "max_poll_records": self.poll_records,
            "fetch_max_wait_ms": 250,
            "max_partition_fetch_bytes": 4 << 20,
            # How long it may go unseen that a topic was deleted and made anew.
            "metadata_max_age_ms": 5_000,
            "metrics_enabled": False,
        }
