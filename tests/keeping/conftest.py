"""A home directory with all that the keeping commands work on, made once; every test gets a copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align3gr.settings import Settings
from features.datasets import PreferenceDataset
from features.log import LogSnapshot
from features.online.exports import export
from features.online.follow import follow
from features.settings import FeatureSettings
from tests.trainer.round_world import POLICIES, TRAINER, add_feedback, make_home, workplace
from trainer.rounds import start_round


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Feedback, v1, a round that registered v2, more feedback, the online store, its exports. Read only."""
    torch.set_num_threads(1)
    home = make_home(tmp_path_factory.mktemp("keeping") / "home")
    start_round(workplace(home))
    add_feedback(home, seed=1, slates=1)
    follow(home / "log", home / "online", FeatureSettings(), once=True)
    export(home / "log", home / "online", FeatureSettings())
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Iterator[Path]:
    copied = Path(shutil.copytree(whole, tmp_path / "home"))
    shutil.rmtree(copied / "online" / "exports" / "applied", ignore_errors=True)
    yield copied
    shutil.rmtree(copied)


def built(snapshot: LogSnapshot, out: Path) -> PreferenceDataset:
    """The dataset that a round of these homes builds at ``snapshot``, in the folder ``out``."""
    return PreferenceDataset.build(snapshot, FeatureSettings(), out, gate_share=POLICIES.gate.share)


def settings_of(home: Path) -> Settings:
    return Settings(home=home, policies=POLICIES, trainer=TRAINER)
