"""Settings of the way in."""

from pydantic import BaseModel, ConfigDict


class KafkaSettings(BaseModel):
    """How to reach the cluster; passed to the client as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class IngestSettings(BaseModel):
    """Workers, batches and dead letters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
