"""The gate's checks one by one, own checks, and what is stored of a decision."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from policies.errors import PoliciesError
from policies.gate import Check, GateInput, OffPolicyFigures, PolicyFigures, decide
from policies.gate.own import UnknownCheck
from policies.gate.record import (
    NoDecision,
    decide_again,
    decision_as_dict,
    input_as_dict,
    input_of,
    same,
)
from policies.gate.resampling import resample, simultaneous_uppers
from policies.gate.words import sentences
from policies.settings import GateSettings

SETTINGS = GateSettings(resamples=500)
USERS = 800


def world(seed: int = 0, *, gain: float = 0.05) -> tuple[np.random.Generator, PolicyFigures, PolicyFigures]:
    """Reference and a candidate that is better by ``gain`` in both metrics."""
    random = np.random.default_rng(seed)
    slate, full = random.beta(3, 2, USERS), np.where(random.random(USERS) < 0.3, random.random(USERS), 0.0)
    noise = random.normal(0, 0.1, (2, USERS))
    candidate = PolicyFigures(
        "v2", {"slate": slate + gain + noise[0], "full": full + gain + noise[1]}, 0.5, 1.0
    )
    return random, candidate, PolicyFigures("v1", {"slate": slate, "full": full}, 0.5, 1.0)


def given(candidate: PolicyFigures, reference: PolicyFigures, **more: object) -> GateInput:
    return GateInput(tuple(f"u{n}" for n in range(USERS)), candidate, reference, **more)  # type: ignore[arg-type]


def with_figures(one: PolicyFigures, **more: object) -> PolicyFigures:
    return PolicyFigures(**{**one.__dict__, **more})  # type: ignore[arg-type]


def test_a_gain_that_new_users_pay_for_is_refused_by_the_slices_name() -> None:
    random, candidate, reference = world(gain=0.08)
    new = random.random(USERS) < 0.2
    slate = np.where(new, reference.per_user["slate"] - 0.2, candidate.per_user["slate"])
    candidate = with_figures(candidate, per_user={**candidate.per_user, "slate": slate})
    assert decide(given(candidate, reference), SETTINGS, seed=1).outcome == "promote"
    decision = decide(given(candidate, reference, user_slices={"new users": new}), SETTINGS, seed=1)
    assert decision.outcome == "refuse"
    assert [one.name for one in decision.failed if one.role == "guard"] == ["slice:slate/new users"]
    assert "new users" in decision.why


def test_items_of_a_slice_are_judged_too() -> None:
    random, candidate, reference = world()
    young = np.where(random.random(USERS) < 0.3, 0.4 * random.random(USERS), np.nan)
    reference = with_figures(reference, item_slices={"full/young items": young})
    candidate = with_figures(candidate, item_slices={"full/young items": young * 0.5})
    decision = decide(given(candidate, reference), SETTINGS, seed=1)
    assert [one.name for one in decision.failed if one.role == "guard"] == ["slice:full/young items"]


def test_a_slice_of_items_may_fall_from_far_above_the_mean_but_not_below_it() -> None:
    random, candidate, reference = world()
    mean = float(np.nanmean(candidate.per_user["full"]))
    favourites = np.where(random.random(USERS) < 0.5, mean + 0.3 + random.normal(0, 0.05, USERS), np.nan)
    reference = with_figures(reference, item_slices={"full/popularity decile 10": favourites})
    for fall, outcome in ((0.2, "promote"), (0.4, "refuse")):
        fallen = with_figures(candidate, item_slices={"full/popularity decile 10": favourites - fall})
        decision = decide(given(fallen, reference), SETTINGS, seed=1)
        assert decision.outcome == outcome
        one = next(one for one in decision.checks if one.name == "slice:full/popularity decile 10")
        assert "as high as all items" in one.words


def test_small_slices_are_silent() -> None:
    _, candidate, reference = world()
    few = np.arange(USERS) < SETTINGS.slice_min_users - 1
    decision = decide(given(candidate, reference, user_slices={"new users": few}), SETTINGS, seed=1)
    assert not any(one.name.startswith("slice:") for one in decision.checks)


def test_many_slices_of_an_equal_candidate_rarely_refuse_it() -> None:
    refused = 0
    for seed in range(60):
        random, candidate, reference = world(seed, gain=0.0)
        parts = {f"part {one}": random.random(USERS) < 0.1 for one in range(20)}
        strict = SETTINGS.model_copy(update={"slice_margin": 0.0, "slate_margin": 0.5, "full_margin": 0.5})
        decision = decide(given(candidate, reference, user_slices=parts), strict, seed=seed)
        refused += decision.outcome == "refuse"
    # Forty slices at 5% each would refuse nearly always; together at 5%, 8 or more have probability 1%.
    assert refused <= 7


def test_simultaneous_bounds_lie_above_single_ones() -> None:
    random = np.random.default_rng(3)
    columns = {str(one): random.normal(0, 1, 300) for one in range(10)}
    found = resample(columns, resamples=1000, random=random)
    uppers = simultaneous_uppers(found, confidence=0.95)
    for name, one in found.items():
        assert uppers[name] > float(np.quantile(one.means, 0.95))
        assert uppers[name] < one.mean + 3.2 * one.error
    assert simultaneous_uppers({}, confidence=0.95) == {}


def test_a_candidate_that_answers_slowly_is_refused() -> None:
    _, candidate, reference = world()
    reference = with_figures(reference, latency_ms=(10.0, 80.0, 11.0))
    slow = with_figures(candidate, latency_ms=(30.0, 200.0, 33.0))
    decision = decide(given(slow, reference), SETTINGS, seed=1)
    assert decision.outcome == "refuse"
    assert "3.00 times as long" in decision.why
    alike = with_figures(candidate, latency_ms=(11.0, 300.0, 12.0))  # one slow turn of the machine
    assert decide(given(alike, reference), SETTINGS, seed=1).outcome == "promote"
    off = SETTINGS.model_copy(update={"latency_factor": None})
    assert decide(given(slow, reference), off, seed=1).outcome == "promote"


@pytest.mark.parametrize(
    ("effective", "high", "outcome"),
    [(500.0, -0.2, "refuse"), (500.0, 0.1, "promote"), (100.0, -0.2, "promote")],
)
def test_sampled_slates_refuse_only_what_they_establish(effective: float, high: float, outcome: str) -> None:
    _, candidate, reference = world()
    found = OffPolicyFigures("doubly robust", 900, 300, effective, -0.3, -0.4, high, 2.0)
    decision = decide(given(candidate, reference, off_policy=found), SETTINGS, seed=1)
    assert decision.outcome == outcome
    assert any(one.name == "off_policy" for one in decision.checks) == (effective >= 200)


def test_input_and_decision_survive_being_stored(tmp_path: Path) -> None:
    random, candidate, reference = world()
    slate = candidate.per_user["slate"].copy()
    slate[:3] = np.nan
    candidate = with_figures(
        candidate,
        per_user={**candidate.per_user, "slate": slate},
        item_slices={"full/young items": slate},
        latency_ms=(1.5, 2.5),
    )
    reference = with_figures(reference, item_slices={"full/young items": slate}, latency_ms=(1.0, 2.0))
    full = given(
        candidate,
        reference,
        anchor=with_figures(reference, version="v0"),
        user_slices={"new users": random.random(USERS) < 0.3},
        off_policy=OffPolicyFigures("doubly robust", 900, 300, 400.0, 0.1, -0.1, 0.3, 2.0),
    )
    (tmp_path / "gate_input.json").write_text(json.dumps(input_as_dict(full)))
    decision = decide(full, SETTINGS, seed=9)
    (tmp_path / "decision.json").write_text(json.dumps(decision_as_dict(decision, SETTINGS, 9)))
    stored, again = decide_again(tmp_path)
    assert same(stored, again)
    assert stored["outcome"] == "promote"
    stored["checks"][0]["statistic"] += 1e-12
    assert not same(stored, again)
    kept = input_of(json.loads((tmp_path / "gate_input.json").read_text()))
    np.testing.assert_array_equal(kept.candidate.per_user["slate"], slate)
    assert decide(kept, SETTINGS, seed=9) == decision


def test_records_that_are_gone_or_old_are_told(tmp_path: Path) -> None:
    with pytest.raises(NoDecision, match="not there"):
        decide_again(tmp_path)
    (tmp_path / "decision.json").write_text('{"outcome": "hold", "why": "", "checks": [], "users": 1}')
    (tmp_path / "gate_input.json").write_text("{}")
    with pytest.raises(NoDecision, match="before decisions named"):
        decide_again(tmp_path)
    newer = {"outcome": "hold", "checks": [], "seed": 1, "settings": {"telepathy": 1}}
    (tmp_path / "decision.json").write_text(json.dumps(newer))
    with pytest.raises(NoDecision, match="telepathy"):
        decide_again(tmp_path)
    (tmp_path / "decision.json").write_text("{half")
    with pytest.raises(NoDecision, match="cannot be read"):
        decide_again(tmp_path)


def test_sentences_say_what_was_for_it_what_against_and_what_was_silent() -> None:
    random, candidate, reference = world(gain=0.08)
    new = random.random(USERS) < 0.2
    promoted = given(candidate, reference, user_slices={"new users": new})
    told = " ".join(_told(promoted))
    assert "passed: it may become the reference" in told
    assert "800 users" in told
    assert "For it: ranking within the slate" in told
    assert "2 slices had enough users" in told
    assert "fewer than 200 sampled slates" in told
    assert "no anchor beside the reference" in told
    refused = " ".join(_told(given(with_figures(candidate, coverage=0.1), reference)))
    assert "refused it" in refused
    assert "Against it, coverage" in refused
    held = " ".join(_told(given(reference, reference)))
    assert "held it" in held
    assert "did not move" in held


def _told(full: GateInput) -> list[str]:
    decision = decision_as_dict(decide(full, SETTINGS, seed=1), SETTINGS, 1)
    return sentences("v2", json.loads(json.dumps(decision)), json.loads(json.dumps(input_as_dict(full))))


OWN = """
from policies.gate import Check

class Novelty:
    name = "novelty"
    def measure(self, policy, lists):
        return {user: float(len(items)) for user, items in lists.items()}
    def judge(self, given, trial):
        value = float(given.candidate.coverage)
        yield Check("novelty", "novelty", value, 0.6, value, value >= 0.6, f"novelty: {value} must be 0.6")

class Broken:
    name = "broken"
    def judge(self, given, trial):
        raise KeyError("what")

judge_less = object()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution as pip leaves it: a module and its metadata on the path."""
    (tmp_path / "our_own_checks.py").write_text(OWN)
    info = tmp_path / "our_checks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-checks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[align3gr.gate_checks]\nnovelty = our_own_checks:Novelty\nbroken = our_own_checks:Broken\n"
        "none = our_own_checks:judge_less\ngone = our_own_checks:Gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "our_own_checks", raising=False)


@pytest.mark.usefixtures("installed")
def test_an_own_check_judges_when_settings_name_it() -> None:
    _, candidate, reference = world()
    assert decide(given(candidate, reference), SETTINGS, seed=1).outcome == "promote"
    named = SETTINGS.model_copy(update={"checks": ("novelty",)})
    decision = decide(given(candidate, reference), named, seed=1)
    assert decision.outcome == "refuse"
    assert decision.why == "novelty: 0.5 must be 0.6"
    novel = with_figures(candidate, coverage=0.7)
    assert decide(given(novel, reference), named, seed=1).outcome == "promote"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("missing", UnknownCheck, "no installed distribution provides"),
        ("gone", PoliciesError, "cannot be loaded"),
        ("none", PoliciesError, "no method judge"),
        ("broken", PoliciesError, "broke: KeyError"),
    ],
)
def test_an_own_check_that_cannot_judge_stops_the_gate(name: str, error: type[Exception], words: str) -> None:
    _, candidate, reference = world()
    with pytest.raises(error, match=words):
        decide(given(candidate, reference), SETTINGS.model_copy(update={"checks": (name,)}), seed=1)


def test_checks_handed_in_are_judged_with_the_built_in_ones() -> None:
    class Never:
        name = "never"

        def judge(self, given: GateInput, trial: object) -> list[Check]:
            return [Check("never", "never", 0.0, 1.0, 0.0, False, f"never: {given.candidate.version}")]

    _, candidate, reference = world()
    assert decide(given(candidate, reference), SETTINGS, seed=1, own=[Never()]).why == "never: v2"


def test_slices_of_other_users_are_an_error() -> None:
    _, candidate, reference = world()
    with pytest.raises(PoliciesError, match="slice new users"):
        decide(
            given(candidate, reference, user_slices={"new users": np.ones(3, dtype=bool)}), SETTINGS, seed=1
        )
