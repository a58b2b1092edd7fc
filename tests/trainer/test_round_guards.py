"""Guards behind the stages of a round: on users of their own, and a round that no stage of it survives."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from features.split import role_of
from policies.registry import Registry
from tests.trainer.round_world import PREFERENCE, make_home, workplace
from trainer.round_steps import NoStageRan
from trainer.rounds import start_round
from trainer.settings import GuardSettings
from trainer.workplace import Workplace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return make_home(tmp_path / "home")


def guarded(home: Path, **bounds: Any) -> Workplace:
    """Rounds whose stages are guarded on a third of the users."""
    place = workplace(home)
    guards = GuardSettings(in_rounds=True, min_users=3, **bounds)
    return replace(
        place,
        trainer=place.trainer.model_copy(
            update={
                "preference": place.trainer.preference.model_copy(update={"guards": guards}),
                "round": place.trainer.round.model_copy(update={"stop_share": 0.3}),
            }
        ),
    )


LOOSE = {
    **{"ndcg_loss": 0.99, "recall_loss": 0.99, "coverage_loss": 0.99, "popularity_rise": 0.99},
    **{"chosen_drift": 1e6, "validity": 1e-6},
}


def test_guarded_stages_are_measured_on_users_the_gate_does_not_look_at(home: Path) -> None:
    place = guarded(home, **LOOSE)
    state = start_round(place)
    assert state.status == "finished"
    judged = json.loads((place.rounds.path("r0001") / "gate_input.json").read_text())["users"]
    for name in ("easy", "hard"):
        facts = state.steps[name]
        assert facts["chained"] is True
        assert facts["guard"]["cases"] == "stop users"
        assert facts["guard"]["after"]["users"] >= 3
    stop = {f"user-{n:03d}" for n in range(48) if role_of(f"user-{n:03d}", 0.3, 0.3) == "stop"}
    assert len(stop) >= state.steps["easy"]["guard"]["after"]["users"]
    assert stop.isdisjoint(judged)


def test_a_round_whose_stages_all_break_a_guard_ends_with_the_reason(home: Path) -> None:
    place = guarded(
        home, ndcg_loss=0.0, recall_loss=0.0, coverage_loss=0.0, popularity_rise=0.0, chosen_drift=1e-9
    )
    wild = (stage.model_copy(update={"learning_rate": 0.05}) for stage in PREFERENCE.stages)
    with pytest.raises(NoStageRan, match=r"came to anything: stage easy broke a guard: .* allowed"):
        start_round(with_stages(place, *wild))
    assert place.ledger.reference() == "v1"
    assert Registry(home).versions() == ["v1"]


def with_stages(place: Workplace, *stages: Any) -> Workplace:
    preference = place.trainer.preference.model_copy(update={"stages": stages})
    return replace(place, trainer=place.trainer.model_copy(update={"preference": preference}))
