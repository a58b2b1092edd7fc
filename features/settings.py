"""Settings of the store."""

from pydantic import BaseModel, ConfigDict


class FeatureSettings(BaseModel):
    """The feedback log, its queries and its upkeep."""

    model_config = ConfigDict(extra="forbid", frozen=True)
