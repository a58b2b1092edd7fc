"""Settings of policies."""

from pydantic import BaseModel, ConfigDict


class PolicySettings(BaseModel):
    """Decoding, gate, promotion and registry."""

    model_config = ConfigDict(extra="forbid", frozen=True)
