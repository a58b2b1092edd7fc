"""Settings of training."""

from pydantic import BaseModel, ConfigDict


class TrainerSettings(BaseModel):
    """Tokenization, SFT, preference stages and rounds."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScheduleSettings(BaseModel):
    """When a round runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
