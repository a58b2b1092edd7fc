"""A round done again from its manifest: the same a month later, and told apart when it cannot be."""

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from features.catalogue import Catalogue, Item
from features.log import FeedbackLog
from features.settings import UpkeepSettings
from features.upkeep import keep_up
from tests.keeping.conftest import settings_of
from tests.trainer.round_world import LATER, add_feedback, workplace
from trainer.reproduction import ManifestGone, NothingToReproduce, reproduce
from trainer.rounds import ClockWentBack, start_round

MONTH = timedelta(days=31)
EAGER = UpkeepSettings(compact_from_files=2, retention_hours=0)


def place_of(home: Path, **changes):  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    return workplace(home, **changes)


def a_month_later(home: Path) -> None:
    """More feedback, new items, compaction, vacuum, tidied rounds."""
    for seed in (4, 5):
        add_feedback(home, seed=seed, slates=1)
    Catalogue.open(home / "catalogue").load([Item(item_id="item-new", title="new")], now=LATER + MONTH)
    Catalogue.open(home / "catalogue").delist(["item-003"], now=LATER + MONTH)
    report = keep_up(
        FeedbackLog.open(home / "log"), home / "datasets", home / "upkeep.lock", EAGER, now=LATER + MONTH
    )
    assert report.compacted
    assert report.deleted
    workplace(home).rounds.tidy(keep=1)
    for name in ("eligible.json", "popularity.json"):
        (home / "rounds" / "r0001" / name).unlink()


def test_a_round_is_the_same_a_month_later_after_compaction_and_vacuum(home: Path) -> None:
    a_month_later(home)
    before = sorted(path.name for path in (home / "datasets").iterdir())
    place = place_of(home, clock=lambda: LATER + MONTH)
    then = place.rounds.read("r0001")
    found = reproduce(place, "r0001")
    assert found.differences == []
    assert found.causes == []
    assert found.dataset_id == found.expected == then.steps["dataset"]["dataset_id"]
    assert sorted(path.name for path in (home / "datasets").iterdir()) == before
    assert place.registry.versions() == ["v1", "v2"]
    assert not (home / "reproduced" / "r0001").exists()


def test_what_differs_is_told(home: Path) -> None:
    place = place_of(home)
    state = place.rounds.read("r0001")
    steps = json.loads(json.dumps(state.steps))
    steps["evaluate"]["candidate"]["slate"] += 0.125
    place.rounds.write(replace(state, steps=steps, made_with={**state.made_with, "torch": "1.0"}))
    found = reproduce(place, steps["dataset"]["dataset_id"])  # named by its dataset
    assert not found.same
    assert [one.name for one in found.differences] == ["evaluate.candidate.slate"]
    assert any(cause.startswith("torch was 1.0, now it is") for cause in found.causes)
    assert found.kept is not None
    assert (found.kept / "rounds" / "r0001" / "gate_input.json").exists()


@pytest.mark.slow
def test_after_a_forget_the_round_is_that_of_the_others(home: Path) -> None:
    from align3gr.forgetting import forget

    user = "user-000"
    done = forget(settings_of(home), user, clock=lambda: LATER, broker=False)
    found = reproduce(place_of(home), "r0001")
    assert found.dataset_id == found.expected == done.datasets[0].now
    assert "dataset_id" not in {one.name for one in found.differences}
    assert any("forgotten" in cause for cause in found.causes)


def test_a_manifest_whose_version_is_gone_is_said(home: Path) -> None:
    place = place_of(home)
    shutil.rmtree(home / "datasets")  # nothing names the version any more
    add_feedback(home, seed=4, slates=1)
    keep_up(FeedbackLog.open(home / "log"), home / "datasets", home / "upkeep.lock", EAGER)
    with pytest.raises(ManifestGone, match="restore a backup of that time"):
        reproduce(place, "r0001")
    assert not (home / "reproduced").exists()


def test_an_id_that_no_round_has_and_a_round_without_figures(home: Path) -> None:
    place = place_of(home)
    with pytest.raises(NothingToReproduce, match="no round nix"):
        reproduce(place, "nix")
    state = place.rounds.read("r0001")
    place.rounds.write(replace(state, steps={"dataset": state.steps["dataset"]}, status="failed"))
    with pytest.raises(NothingToReproduce, match="never came to its gate"):
        reproduce(place, "r0001")


def test_a_clock_that_went_backwards_starts_no_round(home: Path) -> None:
    started = place_of(home).rounds.read("r0001").started_at
    assert started > "2026"
    place = place_of(home, clock=lambda: LATER - timedelta(days=4000))
    with pytest.raises(ClockWentBack, match="set this machine's clock"):
        start_round(place)
    assert len(place.rounds.all()) == 1
