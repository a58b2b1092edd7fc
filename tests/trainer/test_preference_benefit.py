"""The benefit benchmark on a small data set: equal budgets, rows kept, differences against the right rows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import preference_benefit
from benchmarks.baselines.material import material
from tests.policies.factory import tiny_codec, write_tiny_policy
from tests.trainer.rated import write_ratings
from tests.trainer.ring_walks import ITEMS, write_walks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Histories that walk through rings of ten items."""
    place = tmp_path_factory.mktemp("data") / "little"
    write_walks(place, users=60)
    write_tiny_policy(place / "policy", codec=tiny_codec([str(item) for item in range(ITEMS)], (4, 4, 6)))
    return place


@pytest.mark.slow
def test_rows_share_users_and_steps_and_are_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    wanted = ["sft", "sft-more", "sdpo", "sp-mixed", "sp-easy", "rf-mixed"]
    line = [str(folder), "--policy", str(folder / "policy"), "--seeds", "1", "--users", "40", "--beam", "20"]
    line += ["--keep", str(tmp_path / "keep"), "--json", "--rows", *wanted, "--record", str(tmp_path / "r")]
    line += ["--set", "epochs=1", "min_samples=1", "learning_rate=0.002", "anchor=0.5"]
    preference_benefit.main(line)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["name"]: row for row in first["rows"]}
    assert rows["rf-mixed"]["not_run"].startswith("the data set has no feedback levels")
    steps = {name: [one["steps"] for one in row["learned"]] for name, row in rows.items() if "learned" in row}
    samples = {name: rows[name]["learned"][0]["samples"] for name in ("sft-more", "sdpo", "sp-mixed")}
    assert len(set(samples.values())) == 1
    assert steps["sft-more"] == steps["sdpo"] == steps["sp-mixed"]
    chain = sum(rows[name]["learned"][0]["samples"] for name in ("sp-easy", "sp-medium", "sp-hard"))
    assert chain == samples["sft-more"]
    assert "against sft" not in rows["sft"]
    change, low, high = rows["sp-hard"]["against sft-more"]["ndcg@10"]
    assert low <= change <= high
    assert rows["sft"]["ndcg@10"][0] * (1 + rows["sp-hard"]["against sft"]["ndcg@10"][0]) == pytest.approx(
        rows["sp-hard"]["ndcg@10"][0]
    )
    record = json.loads((tmp_path / "r").read_text())
    assert record["command"].startswith("python benchmarks/preference_benefit.py little/ --policy DIR")
    assert str(tmp_path) not in record["command"]
    preference_benefit.main(line)  # nothing is trained again
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1]) == first
    assert "samples," not in told.err


@pytest.mark.slow
def test_feedback_rows_learn_from_ratings_and_only_those_wanted_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    write_ratings(tmp_path / "rated", users=40)
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "trainer: {sft: {backbone: demo, epochs: 1, text_vocabulary: 300, teacher_weight: 0},"
        " tokenization: {hidden: [16], code_dimension: 8, steps: 40, without_text: allow,"
        " collaborative: {epochs: 1}, alignment: {epochs: 1}}}\n"
    )
    line = [str(tmp_path / "rated"), "--settings", str(settings), "--seeds", "1", "--beam", "20", "--json"]
    line += ["--keep", str(tmp_path / "keep"), "--set", "epochs=1", "min_samples=1"]
    preference_benefit.main([*line, "--rows", "rounds-more", "rounds-hard"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows.keys() == {"sft", "rounds-more", "rounds-easy", "rounds-hard"}
    learned = {name: row["learned"][0]["samples"] for name, row in rows.items() if row["learned"]}
    assert learned["rounds-more"] == learned["rounds-easy"] + learned["rounds-hard"]
    assert rows["rounds-hard"].keys() >= {"against sft", "against rounds-more"}


def test_what_is_learned_from_is_not_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preference_benefit.main([str(folder), "--held-back", "1", "--back", "2"])
    assert "--back 2 looks for the item that --held-back 1 learns from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        preference_benefit.main([str(folder), "--policy", "a", "b", "--seeds", "3"])
    assert "one directory for all seeds, or one for each" in capsys.readouterr().err


def test_one_item_held_back_is_one_more_to_learn_from(folder: Path, tmp_path: Path) -> None:
    paper, chain = material(folder, fresh=1, held_back=1), material(folder, fresh=1)
    for user, items in paper.histories.items():
        assert paper.known[user] == max(len(items) - 2, 1)
        assert chain.known[user] == max(len(items) - 3, 1)
    write_ratings(tmp_path / "rated", users=40)
    more, fewer = (material(tmp_path / "rated", fresh=1, held_back=count) for count in (1, 2))
    assert len(more.past) + len(more.fresh) > len(fewer.past) + len(fewer.fresh)
    assert (more.held_back, fewer.held_back) == (1, 2)
