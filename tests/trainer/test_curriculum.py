"""The chain on a real small home: what follows what, what is not built upon, and that no kill matters."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from align3gr.__main__ import app
from align3gr.console import run
from features.settings import DatasetSettings, FeatureSettings
from policies.ledger import PromotionLedger
from policies.policy import Policy
from policies.registry import Registry
from tests.policies.factory import tiny_codec
from tests.trainer.round_world import ITEMS, POLICIES, TRAINER, make_home
from trainer.curriculum import CurriculumPlace, resume_curriculum, start_curriculum
from trainer.preference.guards import GuardFigures, broken
from trainer.preference.stage import METRICS
from trainer.round_state import RoundState
from trainer.rounds import NoRoundOfSelfPlay, RoundIsOver, start_round
from trainer.settings import (
    CurriculumSettings,
    GuardSettings,
    PreferenceSettings,
    SelfPlaySettings,
    SftSettings,
    StageSettings,
    TrainerSettings,
)

LOOSE = GuardSettings(
    min_users=10, ndcg_loss=0.99, recall_loss=0.99, coverage_loss=0.99, popularity_rise=0.99, chosen_drift=50
)
DATA = ("sp-easy", "sp-medium", "sp-hard", "easy", "hard")
SELFPLAY = SelfPlaySettings(width=12, rejected=6)


def stages(**changes: Any) -> tuple[StageSettings, ...]:
    """All five, two passes each; ``changes``: of a stage by its name, "_" for "-"."""
    found = []
    for name in DATA:
        more = changes.get(name.replace("-", "_"), {})
        found.append(
            StageSettings.model_validate(
                {"name": name, "data": name, "learning_rate": 2e-3, "epochs": 2, "min_samples": 8, **more}
            )
        )
    return tuple(found)


def place(
    home: Path, *, guards: GuardSettings = LOOSE, features: FeatureSettings | None = None, **changes: Any
) -> CurriculumPlace:
    """The home under small settings; ``changes``: of the curriculum."""
    wanted = CurriculumSettings.model_validate(
        {"stages": stages(), "selfplay": SELFPLAY, "leave_out": 2, **changes}
    )
    trainer = TRAINER.model_copy(
        update={
            "curriculum": wanted,
            "preference": TRAINER.preference.model_copy(update={"guards": guards}),
            "sft": SftSettings(backbone="demo", steps=2, text_vocabulary=300, teacher_weight=0.0),
        }
    )
    return CurriculumPlace(home, features or FeatureSettings(), POLICIES, trainer)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with feedback and a base policy, no chain yet. Read only: copy it."""
    torch.set_num_threads(1)
    return make_home(tmp_path_factory.mktemp("fresh") / "home")


@pytest.fixture(scope="module")
def finished(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RoundState]:
    """The same home after a whole chain. Read only."""
    home = copy(fresh, tmp_path_factory.mktemp("finished"))
    start_curriculum(place(home), start="v1", who="test")
    return home, place(home).rounds.read("c0001")


@pytest.fixture
def home(fresh: Path, tmp_path: Path) -> Path:
    return copy(fresh, tmp_path)


def copy(home: Path, folder: Path) -> Path:
    return Path(shutil.copytree(home, folder / "home"))


def test_the_whole_chain_runs_each_stage_on_the_policy_of_the_one_before(
    finished: tuple[Path, RoundState],
) -> None:
    home, state = finished
    assert (state.status, state.outcome) == ("finished", "registered")
    assert list(state.steps) == ["start", "dataset", *DATA, "register"]
    for first, second in pairwise(DATA):
        one, two = state.steps[first]["guard"], state.steps[second]["guard"]
        if one["cases"] == two["cases"]:
            assert two["before"] == one["after"]
    for name in DATA:
        facts = state.steps[name]
        assert facts["chained"]
        assert abs(facts["first"]["rewards/chosen"]) < 1e-5  # it starts as its own reference
        assert (home / "curricula" / "c0001" / name / METRICS).exists()
    drawn = [state.steps[name]["selfplay"]["id"] for name in DATA[:3]]
    assert len(set(drawn)) == 3  # from three policies


def test_the_chains_policy_is_registered_with_its_lineage_and_not_promoted(
    finished: tuple[Path, RoundState],
) -> None:
    home, state = finished
    lineage = Registry(home).show("v2")["lineage"]
    assert lineage["parent"] == "v1"
    assert lineage["round_id"] == "c0001"
    assert lineage["curriculum"] == {"id": "c0001", "stages": list(DATA), "seed": 5}
    assert set(lineage["guards"]) == set(lineage["metrics"]) == set(DATA)
    assert lineage["dataset_id"] == state.steps["dataset"]["dataset_id"]
    assert PromotionLedger(home / "ledger").reference() == "v1"
    Policy.load(home / "policies" / "v2")


def test_a_stage_that_breaks_a_bound_is_not_built_upon_and_says_why(home: Path) -> None:
    """A learning rate that destroys the policy, in the middle of the chain."""
    wanted = stages(sp_medium={"learning_rate": 3.0, "epochs": 4})[:3]
    guards = LOOSE.model_copy(update={"coverage_loss": 0.1})
    state = start_curriculum(place(home, guards=guards, stages=wanted), start="v1", who="test")
    medium, hard = state.steps["sp-medium"], state.steps["sp-hard"]
    assert not medium["chained"]
    assert medium["guard"]["broken"][0].startswith("coverage fell by")
    assert hard["guard"]["before"] == state.steps["sp-easy"]["guard"]["after"]
    assert hard["selfplay"]["id"] == medium["selfplay"]["id"]  # drawn from the same policy: not drawn again
    assert "sp-medium" not in Registry(home).show("v2")["lineage"]["curriculum"]["stages"]
    assert "left out sp-medium" in (state.message or "")


def test_losses_that_add_up_along_the_chain_are_seen(home: Path) -> None:
    """Each stage may lose a little; together they may not lose more than one of them."""
    guards = LOOSE.model_copy(update={"chosen_drift": 1e-9})
    state = start_curriculum(place(home, guards=guards, stages=stages()[:2]), start="v1", who="test")
    for name in DATA[:2]:
        guard = state.steps[name]["guard"]
        start, after = (GuardFigures.from_dict(guard[role]) for role in ("start", "after"))
        assert state.steps[name]["chained"] == (not broken(start, after, guards))


class Killed(BaseException):
    """Nothing of ours catches it."""


@pytest.mark.slow
def test_a_chain_killed_again_and_again_ends_like_one_that_was_not(
    finished: tuple[Path, RoundState], home: Path
) -> None:
    whole_home, whole = finished
    for attempt, point in enumerate(("sp-easy: play", "sp-medium", "sp-hard: guard", "hard", None), start=1):

        def kill(step: str, done: int, total: int, point: str | None = point) -> None:
            if step == point and done > 0:
                raise Killed

        watched = replace(place(home), observe=kill)
        with pytest.raises(Killed) if point else nullcontext():
            if attempt == 1:
                start_curriculum(watched, start="v1", who="test")
            else:
                resume_curriculum(watched, "c0001", who="test")
    state = place(home).rounds.read("c0001")
    assert state.attempts == 5
    for name in ("start", *DATA, "register"):
        assert state.steps[name] == whole.steps[name]
    adapter = Path("policies") / "v2" / "adapter" / "adapter_model.safetensors"
    assert (home / adapter).read_bytes() == (whole_home / adapter).read_bytes()
    with pytest.raises(RoundIsOver, match="start a new one with `align3gr curriculum`"):
        resume_curriculum(place(home), "c0001", who="test")


def test_feedback_stages_are_skipped_where_there_is_no_feedback_to_speak_of(home: Path) -> None:
    few = FeatureSettings(dataset=DatasetSettings(min_samples=100_000))
    only = stages()[0:1] + stages()[3:4]
    state = start_curriculum(place(home, features=few, stages=only), start="v1", who="test")
    assert "too few likes" in state.steps["easy"]["skipped"]
    assert state.steps["sp-easy"]["chained"]
    assert state.message == "chained sp-easy; left out easy"


def test_a_chain_without_a_stage_that_ran_registers_nothing(home: Path) -> None:
    never = stages(sp_easy={"min_samples": 10_000})[:1]
    state = start_curriculum(place(home, stages=never), start="v1", who="test")
    assert "at least 10000 are needed" in state.steps["sp-easy"]["skipped"]
    assert (state.outcome, state.steps["register"]["version"]) == ("unchanged", "v1")
    assert Registry(home).versions() == ["v1"]


def test_candidates_can_be_drawn_once(home: Path) -> None:
    state = start_curriculum(place(home, draw="once", stages=stages()[:2]), start="v1", who="test")
    assert state.steps["sp-easy"]["selfplay"]["id"] == state.steps["sp-medium"]["selfplay"]["id"]


def test_without_a_policy_the_chain_begins_with_sft(home: Path) -> None:
    tiny_codec(ITEMS).save(home / "codec")
    wanted = place(home, stages=stages(sp_easy={"epochs": 1})[:1], fresh=1)
    state = start_curriculum(wanted, who="test")
    assert state.steps["start"]["made"] == "sft"
    assert (state.parent, state.steps["register"]["version"]) == ("v2", "v3")
    assert Registry(home).show("v2")["lineage"]["leave_out"] == 3  # one more than self-play
    assert Registry(home).show("v3")["lineage"]["parent"] == "v2"


def test_a_policy_that_knows_the_guarded_items_is_said_to(home: Path) -> None:
    manifest = home / "policies" / "v1" / "policy.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "lineage": {"leave_out": 0}}))
    state = start_curriculum(place(home, stages=stages(sp_easy={"epochs": 1})[:1]), start="v1", who="test")
    said = state.steps["start"]["warning"]
    assert "v1 was trained with --leave-out 0, so it knows the items that the guards look for" in said
    assert "self-play's targets by heart" in said
    assert said.endswith("--leave-out 3")


def test_a_round_refuses_a_self_play_stage_in_one_line(home: Path) -> None:
    preference = PreferenceSettings(stages=(StageSettings(name="one", data="sp-easy"),))
    trainer = TrainerSettings(preference=preference)
    with pytest.raises(NoRoundOfSelfPlay, match=r"stage one plays against itself.*`align3gr curriculum`"):
        start_round(replace(place(home), trainer=trainer))


def test_the_commands_play_and_chain(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = place(home, stages=stages(sp_easy={"epochs": 1})[:1])
    settings = yaml.safe_load((home / "settings.yaml").read_text())
    settings |= {"home": str(home), "trainer": wanted.trainer.model_dump(mode="json")}
    (home / "settings.yaml").write_text(yaml.safe_dump(settings))

    def said(*arguments: str) -> tuple[int, str, str]:
        code = run(app, ["--settings", str(home / "settings.yaml"), *arguments])
        told = capsys.readouterr()
        return code, told.out, told.err

    code, out, _ = said("selfplay", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert code == 0
    assert (home / "selfplay" / facts["selfplay"] / "sp-hard.parquet").is_file()
    code, out, _ = said("selfplay")
    assert f"{facts['targets']} targets of {facts['users']} users" in out
    assert f"sp-easy    {facts['stages']['sp-easy']['samples']:>7} samples" in out
    code, out, _ = said("curriculum", "--from", "v1")
    assert code == 0
    assert "curriculum c0001: v2 registered: chained sp-easy" in out
    assert "to make it the reference: align3gr policy promote v2" in out
    assert said("curriculum", "--resume", "last")[0] == 2
    code, _, error = said("curriculum", "--from", "v9")
    assert code == 2
    assert error.count("\n") == 1
