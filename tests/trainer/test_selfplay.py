"""Self-play data: what is graded how, what is never looked at, and that neither kill nor order matters."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.codec import ScidCodec
from policies.policy import Policy
from policies.settings import DecodingSettings
from policies.trie import ScidTrie
from tests.policies.factory import tiny_codec, tiny_user_codec, write_tiny_policy
from trainer.errors import TrainerError
from trainer.preference.grading import GRADES, Grader, NoCodeVectors, code_vectors, common_prefix
from trainer.preference.selfplay import PART, STAGES, NothingToPlay, SelfPlay, play
from trainer.preference.stage import StageRun, run_stage
from trainer.settings import PreferenceSettings, SelfPlaySettings, StageSettings

NOW = datetime(2026, 5, 1, tzinfo=UTC)
DEEP = ScidCodec(
    [f"i{n}" for n in range(6)],
    np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 1, 0]]),
    (2, 2, 2),
    quantizer_hash="q",
)


def grader(codec: ScidCodec, **changes: Any) -> Grader:
    return Grader.of(codec, ScidTrie.of(codec), SelfPlaySettings(**changes))


def histories(users: int, items: int = 60, *, seed: int = 0) -> dict[str, list[str]]:
    """Each user met 4 to 9 different items."""
    random = np.random.default_rng(seed)
    return {
        f"u{user:04d}": [f"item-{n:03d}" for n in random.permutation(items)[: random.integers(4, 10)]]
        for user in range(users)
    }


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """60 items, four codes a level: every grade has some."""
    folder = tmp_path_factory.mktemp("policy") / "v1"
    write_tiny_policy(folder, codec=tiny_codec(60, (4, 4, 6)))
    return Policy.load(folder, settings=DecodingSettings(beam=20, batch=64))


def played(
    policy: Policy, out: Path, given: Mapping[str, Sequence[str]], *, seed: int = 0, **changes: Any
) -> SelfPlay:
    wanted = SelfPlaySettings(**{"width": 20, "rejected": 8, **changes})
    return play(policy, given, wanted, out, seed=seed, leave_out=2, clock=lambda: NOW)


def rows(data: SelfPlay) -> Iterator[tuple[int, dict[str, Any]]]:
    for level, stage in enumerate(STAGES):
        for row in data.stage(stage).to_pylist():
            yield level, row


def test_only_leading_codes_are_a_common_prefix() -> None:
    # Against (0, 0, 0): itself, the same but the last, first code alone, none though two others agree, none.
    others = np.array([[0, 1, 2, 3, 4]])
    assert common_prefix(DEEP.codes, np.array([0]), others).tolist() == [[3, 2, 1, 0, 0]]


def test_grades_are_by_prefix_and_the_chosen_item_has_none() -> None:
    found = grader(DEEP).grades(np.array([0]), np.array([[0, 1, 2, 3, 4, -1]]))
    assert found.tolist() == [[-1, 2, 1, 0, 0, -1]]


@pytest.mark.parametrize("negatives", ["nearest", "stochastic"])
@pytest.mark.parametrize("fill", ["siblings", "none"])
def test_rejected_items_are_of_their_grade_unseen_and_never_twice(negatives: str, fill: str) -> None:
    codec = tiny_codec(300, (4, 5, 20))
    wanted = grader(codec, negatives=negatives, fill=fill, rejected=12)
    random = np.random.default_rng(3)
    chosen = random.integers(0, 300, 80)
    drawn = np.stack([random.permutation(300)[:30] for _ in chosen])
    seen = np.stack([random.permutation(300)[:15] for _ in chosen])
    drawn[np.array([np.isin(row, not_these) for row, not_these in zip(drawn, seen, strict=True)])] = -1
    for level, grade in enumerate(GRADES):
        found, added = wanted.rejected(grade, chosen, drawn, seen, random)
        assert found.shape == (80, 12)
        for row, item, own, not_these, more in zip(found, chosen, drawn, seen, added, strict=True):
            there = row[row >= 0]
            assert len(set(there)) == len(there)
            assert not set(there) & {item, *not_these}
            assert (wanted.grades(np.array([item]), there[None, :]) == level).all()
            assert sum(one not in own for one in there) == more
            all_of_grade = set(range(300)) - {item, *not_these}
            shared = wanted.grades(np.full(300, item), np.arange(300)[:, None])[:, 0] == level
            possible = len([one for one in all_of_grade if shared[one]])
            if fill == "siblings":  # up to a draw that met many seen items
                assert len(there) >= min(12, possible) - 1
            else:
                assert more == 0


def test_the_nearest_are_those_the_policy_ranks_highest_and_chance_takes_others() -> None:
    codec = tiny_codec(300, (4, 5, 20))
    chosen, drawn = np.array([7]), np.delete(np.arange(300), 7)[None, :200]
    none = np.full((1, 1), -1)
    near = grader(codec, negatives="nearest", rejected=5)
    easy = drawn[near.grades(chosen, drawn) == 0]
    found, _ = near.rejected("easy", chosen, drawn, none, np.random.default_rng(0))
    assert found[0].tolist() == easy[:5].tolist()
    other = grader(codec, negatives="stochastic", rejected=5)
    draws = {
        tuple(other.rejected("easy", chosen, drawn, none, np.random.default_rng(seed))[0][0])
        for seed in range(5)
    }
    assert len(draws) == 5


def test_similarity_grades_by_the_cosine_of_code_vectors(tmp_path: Path) -> None:
    codec = tiny_user_codec(tmp_path / "codec", items=100)
    vectors = code_vectors(codec)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    cosine = vectors[4] @ vectors.T
    found = grader(codec, grading="similarity", similarity=(0.1, 0.4)).grades(
        np.array([4]), np.arange(100)[None, :]
    )[0]
    expected = np.where(cosine < 0.1, 0, np.where(cosine < 0.4, 1, 2))
    expected[4] = -1
    assert found.tolist() == expected.tolist()


def test_similarity_is_refused_where_the_codec_has_no_vectors() -> None:
    with pytest.raises(NoCodeVectors, match=r"set trainer\.curriculum.selfplay.grading to prefix"):
        grader(tiny_codec(20), grading="similarity")


def test_self_play_reads_nothing_of_the_items_left_out(policy: Policy, tmp_path: Path) -> None:
    """The last two items of everyone changed for others: the same samples, to the id of the folder."""
    given = histories(70)
    data = played(policy, tmp_path / "one", given)
    names = [f"item-{n:03d}" for n in range(60)]
    changed = {
        user: [*items[:-2], *[item for item in names if item not in items][:2]]
        for user, items in given.items()
    }
    again = played(policy, tmp_path / "two", changed)
    assert again.selfplay_id == data.selfplay_id
    for stage in STAGES:
        assert again.stage(stage).equals(data.stage(stage))
    for _, row in rows(data):
        training = given[row["user_id"]][:-2]
        assert row["chosen"] == training[-1]
        assert row["history"] == training[:-1]
        assert not set(row["rejected"]) & set(training)


def test_every_grade_holds_what_it_says_and_the_manifest_counts_it(policy: Policy, tmp_path: Path) -> None:
    given = {**histories(70), "short": ["item-000", "item-001", "item-002"], "stranger": ["x"] * 9}
    data = played(policy, tmp_path, given, targets=2)
    codes = {item: policy.codec.encode(item) for item in policy.codec.item_ids}
    for level, row in rows(data):
        assert 1 <= len(row["rejected"]) <= 8
        for item in row["rejected"]:
            same = [a == b for a, b in zip(codes[item], codes[row["chosen"]], strict=True)]
            assert min([*same, False].index(False), 2) == level
    manifest = data.manifest
    assert manifest["policy"]["version"] == policy.version
    assert manifest["refused"] == {
        "fewer than two training items": 1,
        "the target has no SCID in this codec": 2,
    }
    for stage in STAGES:
        table, counts = data.stage(stage), manifest["stages"][stage]
        assert table.num_rows == counts["samples"]
        assert counts["samples"] + counts["refused"]["no item of this grade"] == manifest["targets"]
        assert table.num_rows == len(set(table.column("sample_id").to_pylist()))


@pytest.mark.parametrize("candidates", ["beam", "sampling"])
def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(
    policy: Policy, tmp_path: Path, candidates: str
) -> None:
    given = histories(PART + 40)
    wanted = SelfPlaySettings(candidates=candidates, width=4, rejected=3)  # type: ignore[arg-type]

    def run(out: Path, *, stop_at: int | None = None) -> tuple[SelfPlay | None, list[int]]:
        told: list[int] = []

        def progress(done: int, total: int) -> None:
            told.append(done)
            if stop_at is not None and done >= stop_at:
                raise KeyboardInterrupt

        try:
            data = play(policy, given, wanted, out, seed=3, leave_out=2, clock=lambda: NOW, progress=progress)
        except KeyboardInterrupt:
            return None, told
        return data, told

    whole, _ = run(tmp_path / "whole")
    stopped, _ = run(tmp_path / "killed", stop_at=PART + 1)
    assert stopped is None
    assert not list((tmp_path / "killed").glob("*/manifest.json"))
    resumed, told = run(tmp_path / "killed")
    assert told == [PART, PART + 40]  # the first part is not drawn again
    assert whole is not None
    assert resumed is not None
    assert resumed.manifest == whole.manifest
    for stage in STAGES:
        assert resumed.stage(stage).equals(whole.stage(stage))
    _, told = run(tmp_path / "killed")
    assert told == []  # what is finished is taken as it is


def test_a_seed_decides_and_settings_name_another_run(policy: Policy, tmp_path: Path) -> None:
    given = histories(40)
    one = played(policy, tmp_path, given, samples=20)
    assert all(one.stage(stage).num_rows <= 20 for stage in STAGES)
    assert one.manifest["stages"]["sp-easy"]["refused"]["above the limit of samples"] == 20
    other = played(policy, tmp_path, given, seed=1, samples=20)
    assert other.selfplay_id != one.selfplay_id
    assert not other.stage("sp-easy").equals(one.stage("sp-easy"))
    assert played(policy, tmp_path, given, negatives="nearest").selfplay_id != one.selfplay_id


def test_a_stage_learns_from_a_self_play_table(policy: Policy, tmp_path: Path) -> None:
    write_tiny_policy(tmp_path / "v1", codec=tiny_codec(60, (4, 4, 6)))
    data = played(policy, tmp_path / "play", histories(70))
    stage = StageSettings(name="sp-easy", data="sp-easy", learning_rate=5e-3, epochs=2, min_samples=8)
    done = run_stage(
        tmp_path / "v1",
        data.stage("sp-easy"),
        stage,
        PreferenceSettings(batch_size=16, lora_rank=4, lora_alpha=8),
        StageRun(tmp_path / "out", "candidate", seed=1, policies=tmp_path),
    )
    assert done.samples == 70
    assert done.last["rewards/margins"] > 0


def test_nothing_to_play_and_nothing_played_are_one_line(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(NothingToPlay, match="it needs two that have an SCID"):
        played(policy, tmp_path, {"u": ["item-000", "item-001", "item-002"]})
    data = played(policy, tmp_path, histories(12))
    (data.path / "sp-easy.parquet").write_bytes(b"torn")
    with pytest.raises(TrainerError, match="remove the folder and play again"):
        data.stage("sp-easy")
