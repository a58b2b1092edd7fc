"""Rounds on a real small home directory: what they promote, where they start, and that no kill matters."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.catalogue import Catalogue, Item
from features.datasets import PreferenceDataset, TooFewLikes
from features.log import LogMissing
from policies.codec import ScidCodec
from policies.ledger import PromotionLedger
from policies.policy import Policy, UserContext
from policies.quantizer import ItemEncoder, Quantizer
from policies.registry import Registry
from policies.scoring import answer_log_probs, pack
from tests.policies.factory import tiny_codec, write_tiny_policy
from tests.trainer.round_world import ITEMS, LATER, PREFERENCE, add_feedback, make_home, workplace
from trainer.judging import read_gate_input
from trainer.lease import RoundRunning
from trainer.preference.samples import encode_samples
from trainer.preference.stage import StageRun, run_stage
from trainer.round_state import RoundState, UnknownRound
from trainer.round_steps import NoStageRan, derived_seed
from trainer.rounds import NothingToImprove, RoundIsOver, resume_round, start_round
from trainer.tokenization.text import fit_text_encoder

# Children are forked from a server that has imported torch and touched nothing: they start at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trainer.rounds", "transformers", "peft", "tests.trainer.round_world"])

Condition = Callable[[], bool]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with feedback and a promoted base policy, no round yet. Read only: copy it."""
    return make_home(tmp_path_factory.mktemp("fresh") / "home")


@pytest.fixture(scope="module")
def finished(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same home after one uninterrupted round. Read only."""
    home = copy(fresh, tmp_path_factory.mktemp("finished"))
    assert in_a_process(_round, home) == 0
    return home


@pytest.fixture
def home(fresh: Path, tmp_path: Path) -> Path:
    return copy(fresh, tmp_path)


def copy(home: Path, folder: Path) -> Path:
    return Path(shutil.copytree(home, folder / "home"))


def _round(home: str) -> None:
    """A child's work: take up the last round, or start one."""
    place = workplace(Path(home))
    last = place.rounds.last()
    if last is not None and last.status == "running":
        resume_round(place, last.round_id)
    else:
        start_round(place)


def in_a_process(work: Callable[[str], None], home: Path, kill_when: Condition | None = None) -> int:
    """Run ``work(home)`` in a process; with ``kill_when`` it gets SIGKILL as soon as that holds."""
    process = FORKS.Process(target=work, args=(str(home),))
    process.start()
    deadline = time.monotonic() + 120
    while kill_when is not None and process.is_alive() and time.monotonic() < deadline:
        if kill_when():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.0003)  # registration is over in milliseconds
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def state_of(home: Path) -> RoundState:
    state = workplace(home).rounds.last()
    assert state is not None
    return state


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def outcome_of(home: Path) -> dict[str, Any]:
    """All that a round leaves behind and that may not depend on kills."""
    state = state_of(home)
    round_ = home / "rounds" / state.round_id
    steps = {name: facts for name, facts in state.steps.items() if name not in ("register", "ledger")}
    return {
        "steps": steps,
        "outcome": state.outcome,
        "easy": (round_ / "easy" / "metrics.jsonl").read_text(),
        "hard": (round_ / "hard" / "metrics.jsonl").read_text(),
        "decision": _decision_of(round_),
        "adapter": (home / "policies" / "v2" / "adapter" / "adapter_model.safetensors").read_bytes(),
        "policies": sorted(path.name for path in (home / "policies").iterdir()),
        "ledger": [(e.action, e.source, e.target) for e in PromotionLedger(home / "ledger").history()],
        "datasets": [path.name for path in (home / "datasets").iterdir() if not path.name.startswith(".")],
    }


def _decision_of(round_: Path) -> dict[str, Any]:
    """Without how long answers took: that is a figure of the machine."""
    decision: dict[str, Any] = json.loads((round_ / "decision.json").read_text())
    names = [check["name"] for check in decision["checks"]]
    assert names.count("latency") == 1
    decision["checks"] = [check for check in decision["checks"] if check["name"] != "latency"]
    return decision


def test_a_round_promotes_what_learned_from_feedback(finished: Path) -> None:
    state = state_of(finished)
    assert (state.status, state.outcome, state.parent) == ("finished", "promoted", "v1")
    assert PromotionLedger(finished / "ledger").reference() == "v2"
    assert state.steps["easy"]["last"]["loss"] < state.steps["easy"]["first"]["loss"]
    evaluation = state.steps["evaluate"]
    assert evaluation["candidate"]["slate"] > evaluation["reference"]["slate"]
    manifest = Registry(finished).show("v2")
    lineage = manifest["lineage"]
    assert lineage["parent"] == "v1"
    assert lineage["round_id"] == "r0001"
    assert lineage["dataset_id"] == state.steps["dataset"]["dataset_id"]
    assert lineage["gate"]["outcome"] == "promote"
    assert Policy.load(finished / "policies" / "v2").version == "v2"


def test_stages_learn_from_train_users_only(finished: Path) -> None:
    state = state_of(finished)
    dataset = PreferenceDataset.open(finished / "datasets" / state.steps["dataset"]["dataset_id"])
    assert state.steps["easy"]["samples"] == dataset.stage("easy", "train").num_rows
    learned = set(dataset.stage("easy", "train")["user_id"].to_pylist())
    judged = set(read_gate_input(finished / "rounds" / "r0001" / "gate_input.json").users)
    assert judged
    assert not learned & judged


def test_the_hard_stages_reference_is_what_the_easy_stage_ended_with(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = state_of(finished)
    dataset = PreferenceDataset.open(finished / "datasets" / state.steps["dataset"]["dataset_id"])
    easy = run_stage(
        finished / "policies" / "v1",
        dataset.stage("easy", "train"),
        PREFERENCE.stages[0],
        PREFERENCE,
        StageRun(tmp_path, "easy", derived_seed(state.seed, "easy"), policies=finished / "policies"),
    )
    policy = Policy.load(easy.policy, policies=finished / "policies")
    samples = encode_samples(dataset.stage("hard", "train"), policy.tokens, 20)
    (file,) = (finished / "rounds" / "r0001" / "hard").glob("references-*.safetensors")
    references = load_file(file)["log_probs"]
    with torch.no_grad():
        for number in range(0, len(samples), 25):
            batch = pack([samples.prompts[number]], [samples.answers[number]], policy.tokens.pad)
            scores = answer_log_probs(policy.model, batch)[0]
            torch.testing.assert_close(references[number, : len(scores)], scores, atol=2e-4, rtol=0)


def test_a_round_killed_at_every_point_ends_like_one_that_was_not(finished: Path, home: Path) -> None:
    """One round, killed with SIGKILL seven times over, each time further on."""
    rounds, policies = home / "rounds" / "r0001", home / "policies"

    def steps() -> set[str]:
        file = rounds / "state.json"
        return set(json.loads(file.read_text())["steps"]) if file.exists() else set()

    points: dict[str, Condition] = {
        "dataset half written": lambda: any((home / "datasets").glob(".building-*/easy.parquet")),
        "mid easy": lambda: lines(rounds / "easy" / "metrics.jsonl") >= 3,
        "between stages": lambda: "easy" in steps(),
        "mid hard": lambda: lines(rounds / "hard" / "metrics.jsonl") >= 3,
        "evaluation": lambda: "hard" in steps(),
        "registration": (policies / "v2").exists,
        "ledger move": (home / "ledger" / "00000002.json").exists,
    }
    for point, reached in points.items():
        assert in_a_process(_round, home, kill_when=reached) == -signal.SIGKILL, point
        assert state_of(home).status == "running", point
    assert in_a_process(_round, home) == 0
    assert state_of(home).attempts == len(points) + 1
    assert outcome_of(home) == outcome_of(finished)


@pytest.mark.parametrize("step", ["register", "ledger"])
def test_a_move_that_was_made_but_not_noted_is_not_made_twice(
    finished: Path, tmp_path: Path, step: str
) -> None:
    """The kill between the effect of a step and its note in the state, exactly there."""
    home = copy(finished, tmp_path)
    table, state = workplace(home).rounds, state_of(home)
    noted = dict(list(state.steps.items())[: list(state.steps).index(step)])
    table.write(replace(state, steps=noted, status="running", outcome=None, message=None))
    assert resume_round(workplace(home), "r0001").outcome == "promoted"
    assert outcome_of(home) == outcome_of(finished)


def test_the_next_rounds_parent_is_the_reference_also_after_a_rollback(
    finished: Path, tmp_path: Path
) -> None:
    home = copy(finished, tmp_path)
    place = workplace(home)
    add_feedback(home, seed=1)
    place.ledger.rollback(who="test", why="v2 displeased")
    state = start_round(place)
    assert (state.round_id, state.parent) == ("r0002", "v1")
    assert state.steps["dataset"]["dataset_id"] != state_of(finished).steps["dataset"]["dataset_id"]
    # A rollback holds promotion: the candidate is there for a person to promote.
    assert state.outcome == "registered"
    assert "held" in str(state.message)
    assert place.ledger.reference() == "v1"
    assert place.registry.versions() == ["v1", "v2", "v3"]
    assert place.registry.show("v3")["lineage"]["parent"] == "v1"


def test_a_candidate_whose_parent_was_replaced_meanwhile_is_not_promoted(
    finished: Path, tmp_path: Path
) -> None:
    home = copy(finished, tmp_path)
    place, state = workplace(home), state_of(finished)
    ledger = home / "ledger" / "00000002.json"
    ledger.unlink()
    shutil.copytree(home / "policies" / "v1", home / "policies" / "v9")
    place.ledger.promote("v9", expects="v1", who="somebody", why="was quicker")
    noted = {name: facts for name, facts in state.steps.items() if name != "ledger"}
    place.rounds.write(replace(state, steps=noted, status="running"))
    state = resume_round(place, "r0001")
    assert state.outcome == "registered"
    assert "the reference is v9" in str(state.message)
    assert place.ledger.reference() == "v9"


def test_rounds_chain_by_training_the_same_adapter_further(finished: Path, tmp_path: Path) -> None:
    home = copy(finished, tmp_path)
    add_feedback(home, seed=1)
    state = start_round(workplace(home))
    assert state.parent == "v2"
    manifest = Registry(home).show(state.steps["register"]["version"])
    assert manifest["base"]["version"] == "v1"
    assert (home / "policies" / "v3" / "adapter" / "adapter_config.json").read_text() == (
        home / "policies" / "v2" / "adapter" / "adapter_config.json"
    ).read_text()


def test_an_item_that_came_after_the_policy_enters_with_the_next_round(home: Path) -> None:
    """Coded from its text by the parent's own quantizer; one without text waits."""
    texts = [f"title {item}" for item in ITEMS]
    text = fit_text_encoder(texts, directory=None, dimension=8, vocabulary=100, ngrams=1)
    books = tuple(np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32))
    quantizer = Quantizer(books, np.zeros(8, np.float32), np.ones(8, np.float32), text_width=8)
    digest = ItemEncoder(text, quantizer).save(home / "coded" / "quantizer")
    codes = tiny_codec(ITEMS).codes
    ScidCodec(ITEMS, codes, (8, 8, 8), quantizer_hash=digest).save(home / "coded")
    shutil.rmtree(home / "policies" / "v1")
    write_tiny_policy(home / "policies" / "v1", codec=ScidCodec.load(home / "coded"))
    late = [Item(item_id="late", title="title item-003 again"), Item(item_id="dumb", title="")]
    Catalogue.open(home / "catalogue").load(late, now=LATER, allow_no_text=True)

    assert in_a_process(_round, home) == 0
    state = state_of(home)
    assert state.steps["dataset"]["new_items"] == 1
    parent, child = (Policy.load(home / "policies" / version) for version in ("v1", "v2"))
    assert child.codec.item_ids == (*parent.codec.item_ids, "late")
    assert child.manifest.codec.quantizer_hash == parent.manifest.codec.quantizer_hash
    one = child.recommend([UserContext("u", ("late",))], 1, eligible=["late"], exclude_seen=False)
    assert [place.item_id for place in one[0]] == ["late"]
    assert one[0][0].source == "policy"


def test_a_stage_with_too_few_samples_is_skipped_and_said(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    place = workplace(home)
    easy, hard = PREFERENCE.stages
    place = with_stages(place, easy.model_copy(update={"min_samples": 10_000}), hard)
    state = start_round(place)
    assert "at least 10000 are needed" in state.steps["easy"]["skipped"]
    assert state.steps["hard"]["first"]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert "stage skipped" in caplog.text
    assert state.status == "finished"


def test_a_round_without_any_stage_is_an_error_and_over(home: Path) -> None:
    easy, hard = (s.model_copy(update={"min_samples": 10_000}) for s in PREFERENCE.stages)
    with pytest.raises(
        NoStageRan, match=r"no stage of round r0001 came to anything: stage easy: [0-9]+ samples"
    ):
        start_round(with_stages(workplace(home), easy, hard))
    state = state_of(home)
    assert state.status == "failed"
    with pytest.raises(RoundIsOver, match="r0001 has ended"):
        resume_round(workplace(home), "r0001")


def test_too_few_likes_end_the_round_as_failed(home: Path) -> None:
    place = workplace(home)
    dataset = place.features.dataset.model_copy(update={"min_samples": 10_000})
    place = replace(place, features=place.features.model_copy(update={"dataset": dataset}))
    with pytest.raises(TooFewLikes, match="too few likes"):
        start_round(place)
    assert state_of(home).status == "failed"
    assert Registry(home).versions() == ["v1"]


def test_a_resume_uses_the_settings_the_round_began_with(home: Path) -> None:
    place = workplace(home)
    assert in_a_process(_round, home, lambda: lines(home / "rounds/r0001/easy/metrics.jsonl") >= 2) < 0
    easy, hard = PREFERENCE.stages
    changed = with_stages(place, easy.model_copy(update={"epochs": 7}), hard)
    state = resume_round(changed, "r0001")
    assert state.steps["easy"]["steps"] == 2 * -(-state.steps["easy"]["samples"] // PREFERENCE.batch_size)


def test_no_reference_no_log_and_no_round_are_bad_input(home: Path) -> None:
    with pytest.raises(UnknownRound, match="no round r0007"):
        resume_round(workplace(home), "r0007")
    shutil.rmtree(home / "log")
    with pytest.raises(LogMissing):
        start_round(workplace(home))
    shutil.rmtree(home / "ledger")
    with pytest.raises(NothingToImprove, match="align3gr sft"):
        start_round(workplace(home))


def test_a_second_round_is_refused_while_one_runs(home: Path) -> None:
    process = FORKS.Process(target=_round, args=(str(home),))
    process.start()
    try:
        while not (home / "rounds" / "r0001").exists():
            time.sleep(0.01)
        with pytest.raises(RoundRunning, match=f"process {process.pid}"):
            start_round(workplace(home))
    finally:
        process.kill()
        process.join()
    assert [state.round_id for state in workplace(home).rounds.all()] == ["r0001"]


def with_stages(place: Any, *stages: Any) -> Any:
    preference = place.trainer.preference.model_copy(update={"stages": stages})
    return replace(place, trainer=place.trainer.model_copy(update={"preference": preference}))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
