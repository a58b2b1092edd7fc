"""One typed settings object, put together from the rooms' own models.

Order, weakest first: defaults that run on a laptop, a YAML file, environment variables
(``ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS=...``). An unknown key or an impossible value is an error that names it.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from features.errors import BadInput
from features.settings import FeatureSettings
from ingest.settings import IngestSettings, KafkaSettings
from policies.settings import PolicySettings
from trainer.settings import ScheduleSettings, TrainerSettings

from .server.settings import ServerSettings

ENV_PREFIX = "ALIGN3GR_"
DEFAULT_FILE = Path("align3gr.yaml")


class Settings(BaseSettings):
    """Everything a process of the product needs to know, each room's part under its own key."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    home: Path = Path("var")
    """Where state lives: log, catalogue, datasets, policies, ledger, rounds, online store."""
    kafka: KafkaSettings = KafkaSettings()
    ingest: IngestSettings = IngestSettings()
    features: FeatureSettings = FeatureSettings()
    policies: PolicySettings = PolicySettings()
    trainer: TrainerSettings = TrainerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    server: ServerSettings = ServerSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment variables win over the YAML file, which is passed as init values."""
        return env_settings, init_settings


def load_settings(file: Path | None = None) -> Settings:
    """Read the settings: ``file`` (default: ``align3gr.yaml`` where there is one), then the environment.

    Raises BadInput naming the first key that is unknown or impossible, and where it came from.
    """
    values: dict[str, Any] = {}
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    if file is not None:
        values = _read_yaml(file)
    _refuse_unknown_environment()
    way_out = "see docs/operator.md for the keys and their values"
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        cause = first["msg"].removeprefix("Value error, ")
        cause = "there is no such setting" if first["type"] == "extra_forbidden" else cause
        raise BadInput(f"settings: {key}: {cause[:1].lower()}{cause[1:]}; {way_out}") from error
    except SettingsError as error:
        raise BadInput(
            f"settings: {error} (environment): it is not JSON; set its keys one by one, as "
            f"{ENV_PREFIX}KAFKA__TOPIC; {way_out}"
        ) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise BadInput(
            f"settings file {file} cannot be read: {cause}; correct it, or name another"
        ) from error
    if not isinstance(values, dict):
        raise BadInput(f"settings file {file} must hold keys and values, not {type(values).__name__}")
    return values


def _refuse_unknown_environment() -> None:
    """pydantic-settings ignores a misspelt top-level variable; who set it believes it is in force."""
    for name in os.environ:
        if not name.startswith(ENV_PREFIX) or name == f"{ENV_PREFIX}SETTINGS":
            continue
        top = name[len(ENV_PREFIX) :].split("__")[0].lower()
        if top not in Settings.model_fields:
            known = ", ".join(sorted(Settings.model_fields))
            raise BadInput(f"settings: environment variable {name} names no setting; the keys are {known}")
