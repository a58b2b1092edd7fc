"""Settings of the store."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class OnlineSettings(BaseModel):
    """Feast: the online store the server reads, and how closely it follows the log."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Literal["sqlite", "redis"] = "sqlite"
    """Online store: SQLite under ``home/online`` (one machine), or Redis (server and follower anywhere)."""
    redis: str = "localhost:6379"
    """Feast's connection string of Redis: ``host:port[,password=...,ssl=true,db=0]``; commas separate."""
    poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Pause between two looks at the log's version (s)."""
    seen_items: Annotated[int, Field(ge=1)] = 10_000
    """Seen items kept for a user, most recent first; older ones may be recommended again."""
    batch_users: Annotated[int, Field(ge=1)] = 2_000
    """Users pushed in one write to the online store."""
    export_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Resolution of the offline exports: one state of a user for each such slot of landing time (s);
    0 exports the state after every commit."""


class FeatureSettings(BaseModel):
    """The feedback log, its queries and its upkeep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    online: OnlineSettings = OnlineSettings()
    """Feature store for serving."""
