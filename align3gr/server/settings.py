"""Settings of the HTTP API."""

from pydantic import BaseModel, ConfigDict


class ServerSettings(BaseModel):
    """Address, keys and sampling of the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)
