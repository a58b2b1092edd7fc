"""Settings of training. Importing them imports neither torch nor anything that does."""

from pydantic import BaseModel, ConfigDict

from .curriculum import CurriculumSettings, SelfPlaySettings
from .guards import GuardSettings
from .preference import PreferenceSettings, StageSettings
from .rounds import RoundSettings, ScheduleSettings
from .sft import LoraSettings, SasRecSettings, SftSettings, TaskSettings, TeacherShares
from .tokenization import AlignmentSettings, CollaborativeSettings, TokenizationSettings

__all__ = [
    "AlignmentSettings",
    "CollaborativeSettings",
    "CurriculumSettings",
    "GuardSettings",
    "LoraSettings",
    "PreferenceSettings",
    "RoundSettings",
    "SasRecSettings",
    "ScheduleSettings",
    "SelfPlaySettings",
    "SftSettings",
    "StageSettings",
    "TaskSettings",
    "TeacherShares",
    "TokenizationSettings",
    "TrainerSettings",
]


class TrainerSettings(BaseModel):
    """Tokenization, SFT, preference stages, rounds and the curriculum."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenization: TokenizationSettings = TokenizationSettings()
    sft: SftSettings = SftSettings()
    preference: PreferenceSettings = PreferenceSettings()
    round: RoundSettings = RoundSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
