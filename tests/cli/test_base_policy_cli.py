"""tokenize, codec, sft, recommend, evaluate: from a store to a served list, by the command line alone."""

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
import yaml

from align3gr.__main__ import app
from align3gr.console import run
from features.batch import InteractionBatch, Record
from features.catalogue import Catalogue, Item
from features.interactions import Interaction, Kind, encode_interaction
from features.log import FeedbackLog, offsets_app, watermark_app
from features.settings import FeatureSettings
from tests.trainer import small_world

START = datetime(2026, 3, 1, tzinfo=UTC)
HISTORIES = small_world.histories(60)


def load_catalogue(home: Path, *, without_text: bool = False) -> None:
    items = [
        Item(
            item_id=row["item_id"], title=row["title"], text=row["text"], categories=tuple(row["categories"])
        )
        for row in small_world.items().to_pylist()
    ]
    if without_text:
        items.append(Item(item_id="bare"))
    Catalogue.open(home / "catalogue").load(items, now=START, allow_no_text=True)


def events() -> tuple[list[Interaction], list[Interaction]]:
    """Likes in order of the histories: all but each user's last, and those."""
    logged, held_out = [], []
    for user, history in enumerate(HISTORIES):
        for place, item in enumerate(history):
            event = Interaction(
                event_id=f"e-{user}-{place}",
                user_id=f"user-{user}",
                item_id=item,
                kind=Kind.LIKE,
                occurred_at=START + timedelta(minutes=place),
            )
            (held_out if place == len(history) - 1 else logged).append(event)
    return sorted(logged, key=lambda event: event.occurred_at), held_out


def land(home: Path, logged: list[Interaction]) -> None:
    batch = InteractionBatch.of(FeatureSettings())
    records = [
        Record(encode_interaction(event), 0, number, int(event.occurred_at.timestamp() * 1000))
        for number, event in enumerate(logged)
    ]
    assert not batch.add(records, now=START + timedelta(days=1))
    marks = {
        offsets_app("test", "interactions", 0): len(records) - 1,
        watermark_app("test", "interactions", 0): records[-1].arrived_ms,
    }
    log = FeedbackLog.open(home / "log")
    assert log.transaction_version(offsets_app("test", "interactions", 0)) is None
    log.append(batch.table(START + timedelta(days=1)), marks)


def settings_file(home: Path) -> Path:
    wanted = {
        "home": str(home),
        "policies": {"registry": {"mlflow": False}},
        "trainer": {
            "tokenization": {"hidden": [32], "code_dimension": 8, "steps": 60, "text_dimension": 12},
            "sft": {"backbone": "demo", "epochs": 4, "samples_per_step": 32, "text_vocabulary": 260},
        },
    }
    file = home.parent / "settings.yaml"
    file.write_text(yaml.safe_dump(wanted))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a codec and a promoted base policy, made by the commands themselves."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("base") / "home"
    home.mkdir()
    load_catalogue(home)
    land(home, events()[0])
    file = settings_file(home)
    for command in ("tokenize", "sft"):
        assert run(app, ["--settings", str(file), "--debug", command, "--json"]) == 0
    return home


def call(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(app, ["--settings", str(settings_file(home)), *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts_of(home: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    code, out, err = call(home, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out.splitlines()[-1])
    assert isinstance(facts, dict)
    return facts


def test_the_first_base_policy_is_the_reference(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(home, capsys, "policy", "list")
    assert facts["reference"] == "v1"
    lineage = facts_of(home, capsys, "policy", "show", "v1")["manifest"]["lineage"]  # type: ignore[index]
    assert lineage["settings"]["sft"]["backbone"] == "demo"
    assert lineage["log_version"] >= 1
    assert not any((home / "sft").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_the_same_base_policy_as_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = tmp_path / "home"
    shared.mkdir()
    for name in ("catalogue", "log", "codec"):
        shutil.copytree(home / name, shared / name)
    file = settings_file(shared)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, "-m", "align3gr", "--settings", str(file), "sft", "--device", "cpu", "--json"],
        capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert facts["promoted"] is True
    assert [path.name for path in (shared / "policies").iterdir() if path.name[0] != "."] == ["v1"]
    alone = facts_of(home, capsys, "policy", "show", "v1")["manifest"]["lineage"]["metrics"]["sft"]  # type: ignore[index]
    # Gradients are summed in another order.
    assert facts["losses"] == pytest.approx(alone["losses"], abs=0.02)
    assert (facts["steps"], facts["samples"]) == (alone["steps"], alone["samples"])


def test_a_policys_codec_is_the_fitted_one_with_its_report(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality = facts_of(home, capsys, "codec", "quality", "--policy", "v1")
    assert quality["collision_rate"] is not None
    assert quality == facts_of(home, capsys, "codec", "quality")
    some = [f"item-{number:03d}" for number in range(12)]
    code, out, _ = call(home, capsys, "codec", "encode", *some, "--policy", "v1")
    assert code == 0
    assert "shared" in out


def test_recommendations_are_new_items_of_the_users_topic(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_of(home, capsys, "recommend", "user-0", "user-1", "--k", "5")
    assert facts["policy"] == "v1"
    for user in (0, 1):
        listed = facts["users"][f"user-{user}"]  # type: ignore[index]
        assert [one["position"] for one in listed] == [1, 2, 3, 4, 5]
        assert not {one["item_id"] for one in listed} & set(HISTORIES[user][:-1])
        assert all(one["title"] for one in listed)
    code, out, _ = call(home, capsys, "recommend", "user-0")
    assert code == 0
    assert "user-0  (policy v1" in out


def test_a_delisted_item_is_not_recommended(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = facts_of(home, capsys, "recommend", "user-3", "--k", "1")["users"]["user-3"][0]["item_id"]  # type: ignore[index]
    catalogue = Catalogue.open(home / "catalogue")
    item = catalogue.show(first)
    catalogue.delist([first], now=START)
    try:
        again = facts_of(home, capsys, "recommend", "user-3", "--k", "59")["users"]["user-3"]  # type: ignore[index]
    finally:
        catalogue.load([item], now=START)
    assert first not in {one["item_id"] for one in again}


def test_a_stranger_is_an_error_or_gets_what_is_popular(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(home, capsys, "recommend", "nobody")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "'nobody'" in err
    listed = facts_of(home, capsys, "recommend", "nobody", "--strangers")["users"]["nobody"]  # type: ignore[index]
    assert {one["source"] for one in listed} == {"popularity"}


def test_held_out_events_are_ranked_against_popularity(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "held-out.jsonl"
    file.write_bytes(b"\n".join(encode_interaction(event) for event in events()[1]))
    facts = facts_of(home, capsys, "evaluate", "--held-out", str(file), "--cutoffs", "5,10")
    ranking = facts["ranking"]
    assert (ranking["users"], ranking["validity"]) == (60, 1.0)  # type: ignore[index]
    assert ranking["recall@10"] > facts["popularity"]["recall@10"]  # type: ignore[index]
    code, out, _ = call(home, capsys, "evaluate", "--held-out", str(file), "--all-items", "--limit", "10")
    assert code == 0
    assert "all items: 10 users" in out


def test_gate_users_are_judged_without_a_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(home, capsys, "evaluate")
    assert facts["ranking"]["users"] > 0  # type: ignore[index]
    assert "slates" not in facts


def test_another_sft_is_registered_and_not_promoted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(home, capsys, "sft", "--epochs", "1", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (code, facts["promoted"]) == (0, False)
    assert f"policy promote {facts['version']}" in err
    assert facts_of(home, capsys, "policy", "list")["reference"] == "v1"


def test_policies_are_measured_side_by_side_on_items_left_out(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(home, capsys, "sft", "--epochs", "1", "--leave-out", "1", "--seed", "3", "--json")
    assert code == 0, err
    other = json.loads(out.splitlines()[-1])["version"]
    code, out, err = call(
        home, capsys, "evaluate", "v1", other, "--back", "1", "--beam", "5,12", "--seeds", "--json"
    )
    assert code == 0
    # v1 was trained on every item of the log, the other one without the last of each user.
    assert [line.split()[0] for line in err.splitlines() if "no test" in line] == ["v1"]
    facts = json.loads(out.splitlines()[-1])
    rows = {(row["policy"], row["column"], row["beam"]): row for row in facts["rows"]}
    assert len(rows) == 8
    assert {key[1:] for key in rows} == {(c, b) for c in ("unseen", "all_items") for b in (5, 12)}
    narrow, wide = rows["v1", "unseen", 5], rows["v1", "unseen", 12]
    assert "recall@10" not in narrow  # a beam of 5 holds no ten items
    assert wide["recall@10"] >= wide["recall@5"]
    low, high = wide["intervals"]["recall@10"]
    assert low <= wide["recall@10"] <= high
    assert wide["latency"]["users_per_s"] > 0
    assert wide["recall@10"] >= rows["v1", "all_items", 12]["recall@10"]
    (difference,) = [one for one in facts["differences"] if (one["column"], one["beam"]) == ("unseen", 12)]
    assert difference["of"] == f"{other} - v1"
    assert difference["recall@10"][0] == pytest.approx(
        rows[other, "unseen", 12]["recall@10"] - wide["recall@10"]
    )
    assert len(facts["over_seeds"]) == 4
    code, out, _ = call(home, capsys, "evaluate", "v1", "--back", "2", "--unseen", "--users", "8")
    assert code == 0
    assert "seen left out: 8 users, beam 20" in out
    assert "all items" not in out


def test_examples_of_the_tasks_are_shown_and_nothing_is_trained(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in (home / "policies").iterdir())
    facts = facts_of(home, capsys, "sft", "--preview", "2", "--all-tasks")
    shown = {one["task"]: one for one in facts["tasks"]}  # type: ignore[attr-defined]
    assert len(shown) == 10
    assert shown["next_item"]["examples"][0]["prompt"].endswith("<recommend>")
    assert all(len(one["examples"]) == 2 for one in shown.values() if one["missing"] is None)
    titles = small_world.items()["title"].to_pylist()
    assert any(title in shown["titles_to_item"]["examples"][0]["prompt"] for title in titles)
    assert shown["items_to_title"]["examples"][0]["target"].removesuffix("</s>").strip() in titles

    code, out, err = call(home, capsys, "sft", "--preview", "1")
    assert (code, err) == (0, "")
    assert out.startswith("next_item: ")
    assert "    >>> <a_" in out
    assert "items_to_title" not in out  # it has no weight
    assert sorted(path.name for path in (home / "policies").iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sft", "--all-tasks"], "--preview"),
        (["sft", "--preview", "0"], "--preview"),
        (["codec", "show", "--policy", "v99"], "v99"),
        (["evaluate", "--held-out", "missing.jsonl"], "missing.jsonl"),
        (["evaluate", "--held-out", "missing.jsonl", "--back", "1"], "--back"),
        (["evaluate", "--all-items", "--unseen"], "neither"),
        (["evaluate", "v1", "v99", "--back", "1"], "v99"),
        (["evaluate", "--back", "400"], "more than 400 items"),
        (["evaluate", "--beam", "20;50"], "--beam"),
        (["evaluate", "--cutoffs", "ten"], "ten"),
        (["recommend", "user-0", "--policy", "v99"], "v99"),
        (["sft", "--backbone", "no-such-model"], "no-such-model"),
    ],
)
def test_bad_input_is_one_line_and_two(
    arguments: list[str], says: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in (home / "policies").iterdir())
    code, out, err = call(home, capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert sorted(path.name for path in (home / "policies").iterdir()) == before


@pytest.mark.parametrize(
    ("command", "catalogue", "says"),
    [
        (["tokenize"], False, "catalogue"),
        (["sft"], False, "catalogue"),
        (["sft"], True, "feedback log"),
        (["recommend", "user-0"], False, "no policy"),
        (["codec", "show"], False, "no codec"),
    ],
)
def test_an_empty_home_says_what_comes_first(
    command: list[str], catalogue: bool, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if catalogue:
        load_catalogue(home)
    code, out, err = call(home, capsys, *command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_an_item_without_text_stops_tokenization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = tmp_path / "home"
    home.mkdir()
    load_catalogue(home, without_text=True)
    land(home, events()[0])
    code, _, err = call(home, capsys, "tokenize")
    assert (code, err.count("\n")) == (2, 1)
    assert "'bare'" in err
    assert not (home / "codec").exists()
