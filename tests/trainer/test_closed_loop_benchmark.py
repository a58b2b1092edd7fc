"""The closed-loop benchmark on a handful of made-up people who rate jokes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from align3gr.demo.world import WorldSize
from benchmarks.closed_loop import LEVELS, main
from benchmarks.loop.bandit import LinUcb
from benchmarks.loop.worlds import LoopWorld, demo, jester

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 people of two tastes, 24 jokes."""
    where = tmp_path_factory.mktemp("jester")
    random = np.random.default_rng(0)
    taste = np.where(random.random((160, 1)) < 0.5, 1, -1) * np.where(np.arange(24) < 12, 1, -1)
    ratings = np.clip(600 * taste + random.normal(0, 300, taste.shape), -1000, 1000)
    np.savez(where / "ratings.npz", ratings=ratings.astype(np.int16))
    with gzip.open(where / "jokes.jsonl.gz", "wt") as file:
        for number in range(24):
            kind = "doctor" if number < 12 else "engineer"
            file.write(json.dumps({"id": number, "text": f"A {kind} walks into bar {number}."}) + "\n")
    return where


def world_of(folder: Path, seed: int = 3) -> LoopWorld:
    return jester(folder, seed, judges=40)


def test_nothing_is_better_than_the_truth_or_worse_than_its_opposite(folder: Path) -> None:
    world = world_of(folder)
    worst = world.worth(world.best(-world.liked[world.judges.start :], world.judges))
    assert worst <= world.chance <= world.ceiling <= world.oracle <= 1.0
    assert world.oracle > 0.9


def test_people_who_judge_are_never_learned_from(folder: Path) -> None:
    world = world_of(folder)
    assert set(world.learners).isdisjoint(world.judges)
    assert all(set(past) <= set(np.flatnonzero(world.met[row])) for row, past in enumerate(world.past))
    assert (world.met.sum(axis=1) == 10).all()


def test_the_demo_world_reacts_by_its_model() -> None:
    world = demo(1, WorldSize(items=80, learners=30, evaluated=20, old_slates=2))
    random = np.random.default_rng(0)
    rows, slates = np.arange(30), np.tile(np.arange(10), (30, 1))
    drawn = np.stack([world.react(rows, slates, random) for _ in range(400)])
    expected = world.liked[:30, :10] * world.looked
    np.testing.assert_allclose((drawn == 1).mean(axis=0), expected, atol=0.12)
    assert set(np.unique(drawn)) == {-2, -1, 0, 1}


def test_the_bandit_learns_what_people_like(folder: Path) -> None:
    world = world_of(folder)
    bandit, random = LinUcb(world), np.random.default_rng(0)
    rows, met = np.arange(120), world.met[:120].copy()
    for _ in range(2):
        slates = bandit.slates(rows, met)
        assert not np.take_along_axis(met, slates, axis=1).any()
        bandit.learn(rows, slates, world.react(rows, slates, random))
    assert world.worth(bandit.judged()) > world.chance + 0.1


@pytest.mark.slow
def test_a_loop_reports_every_arm_by_round_and_the_same_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--world", "jester", "--folder", str(folder), "--judges", "40", "--seeds", "1"]
    line += ["--rounds", "2", "--served", "100", "--json"]
    found = []
    for name in ("first", "second"):
        main([*line, "--keep", str(tmp_path / name), "--plot", str(tmp_path / f"{name}.png")])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    first, second = ({**one, "seconds": 0} for one in found)
    assert first == second
    assert all(len(first[name]) == 3 for name in LEVELS)
    assert len(set(first["frozen"])) == 1
    assert first["rfdpo"][0] == first["sft_likes"][0] == first["frozen"][0]
    assert max(first["rfdpo"]) <= first["oracle"][0]
    assert (tmp_path / "first.png").stat().st_size > 10_000
