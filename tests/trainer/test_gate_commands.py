"""``policy why``, ``policy show`` and ``evaluate --off-policy`` on a home that has been through a round."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from align3gr.__main__ import app
from align3gr.console import run
from features.log import FeedbackLog
from features.sampled_slates import sampled_slates
from features.settings import FeatureSettings
from features.split import role_of
from policies.gate.own import UnknownCheck
from policies.policy import Policy
from tests.trainer.round_world import ITEMS, make_home, workplace
from trainer.judging import read_gate_input
from trainer.off_policy import gate_evidence, off_policy_report, sampled_cases
from trainer.rounds import start_round


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round after the base policy: v2 is promoted. Read only."""
    made = make_home(tmp_path_factory.mktemp("gate") / "home")
    assert start_round(workplace(made)).outcome == "promoted"
    return made


def call(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, ["--settings", str(home / "settings.yaml"), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts_of(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = call(home, capsys, *arguments, "--json")
    assert code == 0, err
    facts: dict[str, Any] = json.loads(out.splitlines()[-1])
    return facts


def test_what_the_gate_was_given_has_slices_latency_and_the_decision_all_figures(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = read_gate_input(home / "rounds" / "r0001" / "gate_input.json")
    assert set(given.user_slices) == {"new users", "heavy users"}
    assert {name.split("/")[0] for name in given.candidate.item_slices} == {"slate", "full"}
    assert len(given.candidate.latency_ms) == len(given.reference.latency_ms) == 9
    assert min(given.candidate.latency_ms) > 0
    facts = facts_of(home, capsys, "policy", "show", "v2")
    names = {check["name"] for check in facts["gate"]["checks"]}
    assert {"validity", "coverage", "latency", "slate_not_worse_than_reference", "slate_better"} <= names
    code, out, _ = call(home, capsys, "policy", "show", "v2")
    assert code == 0
    assert "pass  latency:" in out


def test_why_tells_in_sentences_and_the_replay_is_the_same(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(home, capsys, "policy", "why", "v2", "--replay")
    assert code == 0
    assert "The gate judged v2 on" in out
    assert "For it: ranking within the slate" in out
    assert "the decision is the same: promote" in out
    assert "promoted v2 in place of v1" in out
    code, out, _ = call(home, capsys, "policy", "why", "v1")
    assert (code, out.splitlines()[0]) == (0, "v1 comes from no round, so no gate has judged it.")


def test_a_record_that_was_changed_or_is_gone_is_told(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = Path(shutil.copytree(home, tmp_path / "home"))
    settings = yaml.safe_load((copied / "settings.yaml").read_text())
    (copied / "settings.yaml").write_text(yaml.safe_dump({**settings, "home": str(copied)}))
    file = copied / "rounds" / "r0001" / "gate_input.json"
    given = json.loads(file.read_text())
    given["candidate"]["coverage"] = 0.0
    file.write_text(json.dumps(given))
    code, out, _ = call(copied, capsys, "policy", "why", "v2", "--replay")
    assert code == 1
    assert "DIFFERS: refuse" in out
    (copied / "rounds" / "r0001" / "decision.json").unlink()
    code, out, err = call(copied, capsys, "policy", "why", "v2")
    assert (code, out) == (2, "")
    assert "its record is gone" in err
    assert facts_of(copied, capsys, "policy", "show", "v2")["gate"] is None
    assert call(copied, capsys, "policy", "why", "v9")[0] == 2


def test_sampled_slates_are_whole_in_order_and_know_what_came_before(home: Path) -> None:
    snapshot = FeedbackLog.open(home / "log", create=False).snapshot()
    table = sampled_slates(snapshot, FeatureSettings())
    rows = table.to_pylist()
    assert len(rows) == 2 * 48
    assert all(len(row["items"]) == 8 and row["propensities"] == [0.1] * 8 for row in rows)
    first, second = (row for row in rows if row["user_id"] == "user-003")
    assert (first["request_id"], first["met"]) == ("r0-0-3", [])
    assert set(second["met"]) == set(first["items"])
    good = set(ITEMS[: len(ITEMS) // 2])
    liked = {item for row in rows for item, one in zip(row["items"], row["liked"], strict=True) if one}
    assert liked
    assert liked <= good
    gate = sampled_slates(snapshot, FeatureSettings(), gate_share=0.3, role="gate")
    assert {row["user_id"] for row in gate.to_pylist()} == {
        row["user_id"] for row in rows if role_of(row["user_id"], 0.3, 0.0) == "gate"
    }
    assert sampled_slates(snapshot, FeatureSettings(), most=5).num_rows == 5
    never = FeatureSettings(attribution_window_s=1e9)
    assert sampled_slates(snapshot, never).num_rows == 0  # no window has closed: nothing is known yet


def test_off_policy_compares_two_policies_on_the_log(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(home, capsys, "evaluate", "--off-policy", "v2", "v1", "--everybody")
    assert [row["policy"] for row in facts["rows"]] == ["v2", "v1"]
    assert facts["slates"] + facts["left_out"] == 2 * 48
    assert facts["differences"][0]["of"] == "v2 - v1"
    assert facts["rows"][0]["ips"]["low"] <= facts["rows"][0]["ips"]["value"]
    code, out, _ = call(home, capsys, "evaluate", "--off-policy", "v2", "v1", "--everybody")
    assert code == 0
    assert "which is no estimate of any other policy" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["v2"], "two different policies"),
        (["v2", "v2"], "two different policies"),
        (["v2", "v99"], "v99"),
        (["v2", "v1", "--back", "1"], "no --back"),
    ],
)
def test_off_policy_refuses_what_it_cannot_compare(
    home: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, out, err = call(home, capsys, "evaluate", "--off-policy", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err


def test_a_round_with_a_check_that_nobody_provides_ends_before_it_trains(home: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(home, tmp_path / "home"))
    place = workplace(copied)
    gate = place.policies.gate.model_copy(update={"checks": ("nobody_has_this",)})
    strict = replace(place, policies=place.policies.model_copy(update={"gate": gate}))
    with pytest.raises(UnknownCheck, match="nobody_has_this"):
        start_round(strict)
    assert [one.round_id for one in place.rounds.all()] == ["r0001"]


def test_a_policys_own_slates_are_worth_what_was_logged(home: Path) -> None:
    policy = Policy.load(home / "policies" / "v2")
    snapshot = FeedbackLog.open(home / "log", create=False).snapshot()
    cases = [case for case in sampled_cases(sampled_slates(snapshot, FeatureSettings())) if case.user.history]
    served = policy.sample([case.user for case in cases], 5, seed=1, eligible=ITEMS)
    own = [
        type(case)(
            case.user,
            tuple(one.item_id for one in slate),
            tuple(float(one.propensity or 0) for one in slate),
            tuple(ITEMS.index(one.item_id) < len(ITEMS) // 2 for one in slate),
        )
        for case, slate in zip(cases, served, strict=True)
    ]
    report = off_policy_report([policy, policy], own, eligible=ITEMS)
    assert report is not None
    for evaluation in report.evaluations:
        assert evaluation.effective == pytest.approx(report.slates, rel=1e-3)
        assert evaluation.estimates["snips"].value == pytest.approx(report.logged["value"], rel=1e-3)
    evidence = gate_evidence(report)
    assert evidence is not None
    assert evidence.difference == pytest.approx(0.0, abs=1e-12)
    assert np.isfinite(evidence.high)
    assert off_policy_report([policy], own[:1], eligible=ITEMS) is None
