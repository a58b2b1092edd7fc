"""The settings the demo runs with: the product's own, made smaller so that a loop takes minutes on two cores.

They were chosen on world 1; ``align3gr demo`` runs on worlds from FIRST_SEED on, which nobody looked at while
choosing. docs/demo.md has the figures.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align3gr.settings import Settings
from features.settings import DatasetSettings, DuckSettings, FeatureSettings
from ingest.settings import IngestSettings
from policies.settings import DecodingSettings, GateSettings, PolicySettings
from trainer.settings import (
    AlignmentSettings,
    CollaborativeSettings,
    PreferenceSettings,
    RoundSettings,
    SftSettings,
    StageSettings,
    TokenizationSettings,
    TrainerSettings,
)

from .world import WorldSize

FIRST_SEED = 201
ATTRIBUTION_S = 1.0


@dataclass(frozen=True)
class DemoOptions:
    """One world's demo: what a person may choose, and the sizes behind it."""

    seed: int
    rounds: int = 4
    size: WorldSize = field(default_factory=WorldSize)
    slates: int = 2
    """Slates that each learner is shown a round."""
    sampled: float = 0.5
    """Share of slates that are sampled, with propensity; the others are the policy's best ten."""
    sft_epochs: int = 6
    backbone: str = "demo"

    def as_dict(self) -> dict[str, Any]:
        """Kept with the state: another choice is another demo."""
        return asdict(self)


def demo_settings(home: Path, options: DemoOptions, *, window_s: float | None = None) -> Settings:
    """Everything that a demo in ``home`` runs with; ``window_s``: how far back its next dataset looks."""
    # beta holds each stage near its reference: with 1 a chain of eight stages forgets. World 1, liked rate
    # after rounds 1-4: 0.389 0.412 0.393 0.375 (beta 1, NLL anchor 0.3), 0.378 0.416 0.423 0.417 (beta 4).
    stage: dict[str, Any] = {"beta": 4.0, "learning_rate": 2e-3, "epochs": 1}
    return Settings(
        home=home,
        ingest=IngestSettings(linger_s=0.3, watermark_interval_s=0.3),
        features=FeatureSettings(
            attribution_window_s=ATTRIBUTION_S,
            # Mostly the same slate's: older negatives were served by older policies, and a model this small
            # forgets its best lists over them (world 1, three rounds: 0.421 without them, 0.389 with 20).
            max_rejected=5,
            # Three likes of a user a stage: all would double the time of a round and gain little.
            dataset=DatasetSettings(window_s=window_s, max_samples_per_user=3),
            duck=DuckSettings(memory_limit="1GB"),
        ),
        policies=PolicySettings(
            # 240 gate users: NDCG over the catalogue cannot tell a tenth apart with so few.
            gate=GateSettings(share=0.2, min_users=80, full_margin=0.25),
            decoding=DecodingSettings(batch=64),
        ),
        trainer=TrainerSettings(
            # Codes of items alone, from co-occurrence: users' codes would lengthen every prompt, DIN the
            # start, and four rounds have to fit into minutes.
            tokenization=TokenizationSettings(
                users=False,
                levels=2,
                codes=128,
                collaborative=CollaborativeSettings(method="ppmi"),
                alignment=AlignmentSettings(method="none"),
            ),
            sft=SftSettings(
                backbone=options.backbone,
                epochs=options.sft_epochs,
                samples_per_step=256,
                # None of these was there when the demo's figures were measured, and a teacher takes a minute.
                item_tokens=0,
                new_tokens="mean",
                teacher_weight=0.0,
                seed=options.seed,
            ),
            preference=PreferenceSettings(
                stages=(
                    StageSettings(name="easy", data="easy", **stage),
                    StageSettings(name="hard", data="hard", **stage),
                ),
                batch_size=32,
                micro_batch=32,
                gradient_norm=1.0,
            ),
            round=RoundSettings(seed=options.seed, device="cpu", threads=0),
        ),
    )
