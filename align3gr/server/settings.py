"""Settings of the HTTP API."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class ServerSettings(BaseModel):
    """Address, keys, sampling and pace of the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    """Address to listen on. Another one than this machine's own loopback is refused without ``api_key``."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one and says which."""
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    """Key that everything that writes asks for (header ``X-API-Key``); without one feedback is refused."""
    key_for_reads: bool = False
    """Whether recommendations ask for the key, too."""
    k: Annotated[int, Field(ge=1)] = 10
    """Items of a slate when the request does not say."""
    max_k: Annotated[int, Field(ge=1, le=1000)] = 100
    """Most items that a request may ask for."""
    sample_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of requests whose slate is sampled, with its propensity; the rest is the best slate."""
    poll_seconds: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    """Pause between two looks at the promotion ledger (s)."""
    warm_policies: Annotated[int, Field(ge=0)] = 2
    """Policies kept in memory beside the reference: the newest registered candidate and the last reference,
    so that promotion and rollback swap at once. 0 loads each when it becomes the reference."""
    device: str = "cpu"
    """Where the policy runs: ``cpu``, ``cuda``, ``cuda:1`` ..."""
    merge_adapters: bool = False
    """Add adapters into the weights when loading: a quarter less CPU a request, but every policy kept warm
    is a whole model instead of an adapter on shared weights."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads torch uses for one decode; 0 leaves it to torch (every core)."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Most requests decoded together. Only requests that already wait are: nobody waits for company."""
    queue_size: Annotated[int, Field(ge=1)] = 1024
    """Requests that may wait; more are answered 503 at once."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A request that waited longer is answered 503 (s)."""
    catalogue_seconds: Annotated[float, Field(gt=0)] = 10.0
    """Pause between two looks at the catalogue for delisted items (s)."""
    feedback_batch: Annotated[int, Field(ge=1)] = 500
    """Most interactions in one feedback request."""
    feedback_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """A feedback request is answered 503 when Kafka has not acknowledged it by then (s)."""
    record_served: bool = True
    """Whether what was served is recorded to Kafka."""
    record_queue: Annotated[int, Field(ge=1)] = 50_000
    """Served events that may wait for Kafka; more are dropped and counted, requests never wait."""
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """Time for events that still wait for Kafka when the server stops (s)."""
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "warning"
    """Level of the HTTP server's own log."""
