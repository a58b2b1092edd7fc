"""What a round works with: the home directory's stores, the rooms' settings, and the world outside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from features.log import FeedbackLog
from features.settings import FeatureSettings
from policies.ledger import PromotionLedger
from policies.registry import Registry
from policies.settings import PolicySettings

from .ranks import Ranks
from .round_state import RoundsTable
from .settings import TrainerSettings


class Observe(Protocol):
    """Told of progress within a step."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """``total`` 0 where it is not known."""


def utc_now() -> datetime:
    """The clock of production; tests pass their own."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Workplace:
    """One home directory under one set of settings."""

    home: Path
    features: FeatureSettings = field(default_factory=FeatureSettings)
    policies: PolicySettings = field(default_factory=PolicySettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    clock: Callable[[], datetime] = utc_now
    ranks: Ranks = field(default_factory=Ranks)
    observe: Observe | None = None

    @property
    def rounds(self) -> RoundsTable:
        """The rounds table."""
        return RoundsTable(self.home / "rounds")

    @property
    def datasets(self) -> Path:
        """Where the dataset snapshots lie."""
        return self.home / "datasets"

    @property
    def ledger(self) -> PromotionLedger:
        """The promotion ledger."""
        return PromotionLedger(self.home / "ledger", clock=self.clock)

    @property
    def registry(self) -> Registry:
        """The policies."""
        return Registry(self.home, self.policies.registry)

    def log(self) -> FeedbackLog:
        """The feedback log. Raises LogMissing."""
        return FeedbackLog.open(self.home / "log", create=False)

    def count_feedback(self, files: Sequence[str]) -> int:
        """Rows with a level in these files of the log: what is learned from."""
        if not files:
            return 0
        from features.duck import connect

        with connect(self.features) as con:
            query = "select count(level) from read_parquet($files, hive_partitioning = true)"
            row = con.execute(query, {"files": list(files)}).fetchone()
        return int(row[0]) if row else 0

    def settings_as_json(self) -> dict[str, Any]:
        """The rooms' settings for a round's state; secrets stay out."""
        return {
            "features": self.features.model_dump(mode="json", exclude={"request_key"}),
            "policies": self.policies.model_dump(mode="json"),
            "trainer": self.trainer.model_dump(mode="json"),
        }

    def with_settings(self, settings: dict[str, Any]) -> "Workplace":
        """This workplace under the settings that a round began with."""
        return replace(
            self,
            features=FeatureSettings.model_validate(settings["features"]),
            policies=PolicySettings.model_validate(settings["policies"]),
            trainer=TrainerSettings.model_validate(settings["trainer"]),
        )
