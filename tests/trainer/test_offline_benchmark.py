"""The offline benchmark on a small data set: rows by hand, rows recorded, the two training loops alike."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import offline, sft_speed
from benchmarks.baselines.models import Factors, Fusion, Mixture
from benchmarks.baselines.policies import POLICIES, policy_key
from benchmarks.baselines.reading import read
from benchmarks.baselines.simple import ItemKnn, Popularity
from tests.trainer.ring_walks import ITEMS, write_walks
from trainer.metrics import rank_scores
from trainer.settings import SftSettings, TaskSettings, TrainerSettings
from trainer.sft.data import windows_of
from trainer.sft.training import accumulate

USERS = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Histories that walk through rings of ten items, ids that are no rows."""
    place = tmp_path_factory.mktemp("data") / "little"
    write_walks(place, USERS, first_id=100)
    return place


def test_the_split_shows_no_model_the_last_two_items(folder: Path) -> None:
    test, valid = read(folder, back=1), read(folder, back=2)
    for data, back in ((test, 1), (valid, 2)):
        for training, history in zip(data.training, data.histories, strict=True):
            assert training.tolist() == history[: len(history) - (2 - back)].tolist()
    assert [history[-1] for history in test.histories] == valid.targets.tolist()
    assert len(read(folder, users=7).targets) == 7
    assert len(read(folder, users=7).training) == USERS


def test_popularity_and_item_knn_are_what_they_say(folder: Path) -> None:
    data = read(folder)
    counts = Counter(int(item) for history in data.training for item in history)
    scores = Popularity(data.training, ITEMS).scores(data.histories[:2])
    assert scores.tolist() == [[counts[item] for item in range(ITEMS)]] * 2
    users = {i: {u for u, h in enumerate(data.training) if i in h} for i in range(ITEMS)}
    found = ItemKnn(data.training, ITEMS, neighbours=3, shrink=2.0).scores(data.histories[:5])
    for row, history in zip(found, data.histories, strict=False):
        expected = np.zeros(ITEMS)
        for i in history:
            similar = [
                (len(users[i] & users[j]) / (math.sqrt(len(users[i]) * len(users[j])) + 2.0), -j)
                for j in range(ITEMS)
                if j != i and users[i] & users[j]
            ]
            for weight, j in sorted(similar, reverse=True)[:3]:
                expected[-j] += weight
        np.testing.assert_allclose(row, expected, rtol=1e-5)


class Fixed:
    def __init__(self, scores: list[float]) -> None:
        self.values = np.array([scores], dtype=np.float32)

    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        return np.repeat(self.values, len(histories), axis=0)


def test_mixtures_are_their_formulas() -> None:
    first, rules = Fixed(np.log([0.5, 0.3, 0.2]).tolist()), Fixed([0.0, 1.0, 3.0])
    asked = [np.array([0])]
    np.testing.assert_allclose(Mixture(first, rules).scores(asked)[0], [0.3, 0.28, 0.42], rtol=1e-6)
    expected = np.log([0.5, 0.3, 0.2]) + 2 * np.log1p(20 * np.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(Fusion(first, rules).scores(asked)[0], expected, rtol=1e-6)
    silent = Fixed([0.0, 0.0, 0.0])
    np.testing.assert_allclose(Mixture(first, silent).scores(asked)[0], [0.3, 0.18, 0.12], rtol=1e-6)


def test_factors_belong_to_the_user_whose_training_history_it_is() -> None:
    training = [np.array([0, 1]), np.array([2])]
    row = {history.tobytes(): user for user, history in enumerate(training)}
    model = Factors(np.eye(2, dtype=np.float32), np.array([[1, 5], [2, 6]], np.float32), row, later=1)
    assert model.scores([np.array([2, 0]), np.array([0, 1, 2])]).tolist() == [[5.0, 6.0], [1.0, 2.0]]


def test_rows_are_recorded_and_merged_by_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, keep = tmp_path / "rows.json", tmp_path / "keep"
    settings = tmp_path / "settings.yaml"
    settings.write_text("trainer: {sft: {sasrec: {epochs: 2, dimension: 16, held_out: 0.0}}}\n")
    line = [str(folder), "--keep", str(keep), "--record", str(file), "--settings", str(settings)]
    offline.main([*line, "--rows", "popularity", "rules", "als"])
    offline.main([*line, "--rows", "sasrec", "mixture", "teacher", "--seeds", "2", "--json"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    recorded = json.loads(file.read_text())
    rows = {row["name"]: row for row in recorded["rows"]}
    assert [row["name"] for row in recorded["rows"]][:3] == ["popularity", "rules", "als"]
    assert "--python" in rows["als"]["not_reproduced"]
    assert rows["lightgcn"]["not_reproduced"]
    assert rows["sasrec"] == next(row for row in printed["rows"] if row["name"] == "sasrec")
    assert (rows["popularity"]["seeds"], rows["mixture"]["seeds"]) == (1, 2)
    for name in ("popularity", "rules", "sasrec", "mixture"):
        assert {"command", "commit", "device", "date", "train_seconds"} <= rows[name].keys()
        for column in ("unseen", "all_items"):
            mean, low, high = rows[name][column]["recall@10"]
            assert 0 <= low <= mean <= high <= 1
            assert len([key for key in rows[name][column] if key.startswith(("recall", "ndcg"))]) == 12
    # In rings of ten the next item follows from the last: rules know it, popularity cannot.
    assert rows["rules"]["unseen"]["recall@1"][0] > 0.9 > rows["popularity"]["unseen"]["recall@10"][0]
    data = read(folder)
    direct = rank_scores(Popularity(data.training, ITEMS), data.histories, data.targets, data.order)
    assert rows["popularity"]["unseen"]["ndcg@10"][0] == pytest.approx(
        direct["unseen"].means["ndcg@10"], abs=1e-5
    )
    assert list(keep.glob("little-1-all-sasrec-*.npz"))


def test_the_likes_of_other_models_are_our_settings_with_parts_left_out() -> None:
    rich = TrainerSettings(
        sft=SftSettings(teacher_weight=0.5, item_tokens=100, tasks=TaskSettings(item_to_text=1.0))
    )
    plain = POLICIES["tiger-like"](rich)
    assert (plain.sft.teacher_weight, plain.sft.item_tokens) == (0.0, 0)
    assert not any(plain.sft.tasks.weights.values())
    assert (plain.tokenization.users, plain.tokenization.collaborative.method) == (False, "none")
    assert POLICIES["letter-tiger-like"](rich).tokenization.collaborative == rich.tokenization.collaborative
    assert POLICIES["ours"](rich) == rich
    # A policy kept under other settings is never taken for one under these.
    assert len({policy_key(name, one) for name in POLICIES for one in (rich, TrainerSettings())}) == 6


@pytest.mark.slow
def test_our_pipeline_is_a_row(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "trainer: {sft: {backbone: demo, epochs: 40, samples_per_step: 64, text_vocabulary: 300,"
        " teacher_weight: 0, item_tokens: 0},"
        " tokenization: {hidden: [16], code_dimension: 8, steps: 40, collaborative: {epochs: 1},"
        " alignment: {epochs: 1}}}\n"
    )
    keep = tmp_path / "keep"
    line = [str(folder), "--rows", "tiger-like", "ours", "--seeds", "1", "--only", "--json"]
    offline.main([*line, "--keep", str(keep), "--settings", str(settings), "--beam", "5", "100"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for row in rows:
        assert row["unseen"]["recall@100"][0] == 1.0  # 40 items
        assert row["unseen"]["recall@10"][0] > 0.3  # a quarter by chance
        assert row["unseen"]["depth"] == 10
    offline.main([*line, "--keep", str(keep), "--settings", str(settings), "--beam", "5", "100"])  # kept
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["unseen"] for row in again] == [row["unseen"] for row in rows]


def test_our_loop_and_the_padded_one_have_the_same_loss(folder: Path, one_thread: None) -> None:
    work = sft_speed.work_of(folder, "demo", 12, 1.0, 4)
    model = work.backbone().model.eval()
    settings = SftSettings(drop_items=0.0, precision="float32")
    windows = windows_of(work.histories)
    mine, _ = accumulate(model, windows, work.tokens, settings, np.random.default_rng(0), "cpu", None)
    batch = sft_speed.padded(work.tokens.pad)(sft_speed.sequences(work))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert mine == pytest.approx(float(loss), abs=1e-4)
