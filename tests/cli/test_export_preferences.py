"""`align3gr export-preferences`: what it writes from a home directory, and what it refuses in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align3gr.__main__ import app
from align3gr.console import run
from features.datasets import PreferenceDataset
from features.log import FeedbackLog
from features.settings import FeatureSettings
from tests.trainer.round_world import make_home

Call = Callable[..., tuple[int, str, str]]
"""Runs the command: exit code, what it printed, what it said."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreferenceDataset:
    home = make_home(tmp_path_factory.mktemp("home") / "home")
    log = FeedbackLog.open(home / "log").snapshot()
    return PreferenceDataset.build(log, FeatureSettings(), home / "datasets", gate_share=0.3)


@pytest.fixture
def call(dataset: PreferenceDataset, capsys: pytest.CaptureFixture[str]) -> Call:
    settings = dataset.path.parent.parent / "settings.yaml"

    def called(*arguments: str) -> tuple[int, str, str]:
        code = run(app, ["--settings", str(settings), "export-preferences", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return called


def test_the_newest_datasets_training_samples_are_written_for_the_reference(
    call: Call, dataset: PreferenceDataset, tmp_path: Path
) -> None:
    code, out, err = call(str(tmp_path / "pairs.jsonl"), "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    table = dataset.stage("easy", "train")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert facts["policy"] == "v1"
    assert (facts["samples"], facts["rows"]) == (table.num_rows, len(rows))
    wanted = {(row["sample_id"], n) for row in table.to_pylist() for n in range(len(row["rejected"]))}
    assert len(rows) == len(wanted)
    assert {row["sample_id"] for row in rows} == {name for name, _ in wanted}
    assert all(row["prompt"].endswith("<recommend>") and row["chosen"] != row["rejected"] for row in rows)


def test_a_parquet_file_of_samples_is_a_stage_too(call, dataset: PreferenceDataset, tmp_path: Path) -> None:
    pq.write_table(dataset.stage("hard"), tmp_path / "stage.parquet")
    out = tmp_path / "lists.parquet"
    given = ["--dataset", str(tmp_path / "stage.parquet"), "--rows", "lists", "--role", "all"]
    assert call(str(out), *given)[0] == 0
    assert pq.read_table(out).num_rows == dataset.stage("hard").num_rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pairs.csv"], "is neither .jsonl nor .parquet"),
        (["pairs.jsonl", "--stage", "medium"], "stage medium: choose one of easy, hard"),
        (["pairs.jsonl", "--role", "nobody"], "role nobody: choose one of train, stop, gate, all"),
        (["pairs.jsonl", "--dataset", "nowhere"], "nowhere holds no finished dataset"),
        (["pairs.jsonl", "--dataset", "items.parquet"], "has no column chosen"),
        (["pairs.jsonl", "--policy", "v9"], "v9"),
    ],
)
def test_what_cannot_be_is_one_line(
    call: Call, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"item_id": ["a"]}), "items.parquet")
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "pairs.jsonl").exists()
