"""A small real home directory for rounds: catalogue, feedback log, a promoted base policy, settings.

The users' taste is simple: items of the first half of the catalogue are liked, of the second half disliked or
passed over. The base policy is random, so a round has something to learn.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import yaml

from features.batch import InteractionBatch, Record
from features.catalogue import Catalogue, Item
from features.interactions import Interaction, Kind, encode_interaction
from features.log import FeedbackLog, offsets_app, watermark_app
from features.settings import FeatureSettings
from policies.ledger import PromotionLedger
from policies.settings import GateSettings, PolicySettings, RegistrySettings
from tests.policies.factory import tiny_codec, write_tiny_policy
from trainer.settings import PreferenceSettings, RoundSettings, StageSettings, TrainerSettings
from trainer.workplace import Workplace

ITEMS = [f"item-{number:03d}" for number in range(48)]
START = datetime(2026, 3, 1, tzinfo=UTC)
LATER = datetime(2026, 4, 1, tzinfo=UTC)

PREFERENCE = PreferenceSettings(
    stages=(
        StageSettings(name="easy", data="easy", learning_rate=5e-3, epochs=2, min_samples=8),
        StageSettings(name="hard", data="hard", learning_rate=5e-3, epochs=2, min_samples=8),
    ),
    batch_size=32,
    lora_rank=4,
    lora_alpha=8,
)
TRAINER = TrainerSettings(preference=PREFERENCE, round=RoundSettings(seed=5, device="cpu", threads=1))
POLICIES = PolicySettings(
    gate=GateSettings(share=0.3, min_users=10, resamples=300, coverage_share=0.1, concentration_rise=1.0),
    registry=RegistrySettings(mlflow=False),
)


def workplace(home: Path, **changes: object) -> Workplace:
    """The home directory under the settings above."""
    return Workplace(home, FeatureSettings(), POLICIES, TRAINER, **changes)  # type: ignore[arg-type]


def make_home(home: Path) -> Path:
    """Catalogue, first feedback, base policy v1 promoted, and ``settings.yaml`` for the command line."""
    home.mkdir(parents=True)
    items = [Item(item_id=item, title=f"title {item}") for item in ITEMS]
    Catalogue.open(home / "catalogue").load(items, now=START)
    add_feedback(home, seed=0)
    write_tiny_policy(home / "policies" / "v1", codec=tiny_codec(ITEMS))
    PromotionLedger(home / "ledger").promote("v1", expects=None, who="test", why="the base policy")
    settings = {
        "home": str(home),
        "policies": POLICIES.model_dump(mode="json"),
        "trainer": TRAINER.model_dump(mode="json"),
    }
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))
    return home


def add_feedback(home: Path, seed: int, users: int = 48, slates: int = 2) -> int:
    """Land one more batch of sampled slates and their reactions; returns the log's version."""
    log = FeedbackLog.open(home / "log")
    app, mark = offsets_app("test", "interactions", 0), watermark_app("test", "interactions", 0)
    first = (log.transaction_version(app) or 0) + 1
    batch = InteractionBatch.of(FeatureSettings())
    records = [
        Record(encode_interaction(event), 0, first + number, int(event.occurred_at.timestamp() * 1000))
        for number, event in enumerate(_events(seed, users, slates))
    ]
    refused = batch.add(records, now=LATER)
    assert not refused, refused[0]
    offset = first + len(records) - 1
    return log.append(batch.table(LATER), {app: offset, mark: int(LATER.timestamp() * 1000)})


@dataclass
class _Stamp:
    """Counts events up, a second apart."""

    prefix: str
    number: int = 0

    def next(self) -> tuple[str, datetime]:
        self.number += 1
        day = int(self.prefix) * timedelta(days=1)
        return f"e{self.prefix}-{self.number}", START + day + timedelta(seconds=self.number)


def _events(seed: int, users: int, slates: int) -> Iterator[Interaction]:
    random = np.random.default_rng(seed)
    stamp = _Stamp(str(seed))
    for round_ in range(slates):
        for user in range(users):
            shown = random.choice(ITEMS, 8, replace=False).tolist()
            request = f"r{seed}-{round_}-{user}"
            about = {"user_id": f"user-{user:03d}", "request_id": request, "policy_version": "v1"}
            for kind in (Kind.SERVED, Kind.IMPRESSION):
                for position, item in enumerate(shown, start=1):
                    event_id, at = stamp.next()
                    yield Interaction(
                        event_id=event_id, item_id=item, kind=kind, occurred_at=at, position=position,
                        propensity=0.1, **about,
                    )  # fmt: skip
            for item in shown:
                good, drawn = ITEMS.index(item) < len(ITEMS) // 2, random.random()
                kind = (
                    Kind.LIKE if good and drawn < 0.6 else Kind.DISLIKE if not good and drawn < 0.4 else None
                )
                if kind is not None:
                    event_id, at = stamp.next()
                    yield Interaction(event_id=event_id, item_id=item, kind=kind, occurred_at=at, **about)
