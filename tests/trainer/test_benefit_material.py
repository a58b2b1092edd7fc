"""Ratings as material of the benefit benchmark: nothing learns from what is to be found, or from after it."""

from pathlib import Path

import pytest

from benchmarks.baselines.material import FRESH_SHARE, material
from tests.trainer.rated import write_ratings
from tests.trainer.ring_walks import write_walks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings of a few users."""
    place = tmp_path_factory.mktemp("data") / "rated"
    write_ratings(place, users=12)
    return place


def stars(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """User -> (film, stars) in the order of time."""
    found: dict[str, list[tuple[str, float]]] = {}
    for line in (folder / "ratings.csv").read_text().splitlines()[1:]:
        user, film, rating, _ = line.split(",")
        found.setdefault(user, []).append((film, float(rating)))
    return found


def test_a_history_ends_with_the_last_like_and_holds_what_was_not_disliked(folder: Path) -> None:
    data, told = material(folder, 1), stars(folder)
    assert data.histories
    for user, history in data.histories.items():
        last = max(place for place, (_, rating) in enumerate(told[user]) if rating >= 4)
        assert history == [film for film, rating in told[user][: last + 1] if rating >= 3]
        assert data.seen(user, 1) == {film for film, _ in told[user][:last]}
        assert data.seen(user, 2) == set(history[:-2])
        training = len(history) - 2
        assert data.known[user] == max(training - max(training // FRESH_SHARE, 1), 1)


def test_feedback_stops_before_the_validation_item(folder: Path) -> None:
    data, told = material(folder, 1), stars(folder)
    for user, history in data.histories.items():
        learned = [event.item_id for event in (*data.past, *data.fresh) if event.user_id == user]
        films = [film for film, _ in told[user]]
        assert learned == films[: films.index(history[-2])]
        known = [event.item_id for event in data.past if event.user_id == user]
        assert set(history[: data.known[user]]) <= set(known)
        assert history[-3] not in known or data.known[user] == len(history) - 2


def test_samples_choose_fresh_likes_and_reject_by_level(folder: Path, tmp_path: Path) -> None:
    data, told = material(folder, 1), stars(folder)
    tables = data.feedback(tmp_path)
    assert {name: table.num_rows > 0 for name, table in tables.items()} == {"easy": True, "hard": True}
    for stage, table in tables.items():
        for row in table.to_pylist():
            rating = dict(told[row["user_id"]])
            fresh = {event.item_id for event in data.fresh if event.user_id == row["user_id"]}
            assert row["chosen"] in fresh
            assert rating[row["chosen"]] >= 4
            assert {rating[item] for item in row["rejected"]} == ({1.0} if stage == "easy" else {3.0})
            assert not {row["chosen"], *row["rejected"]} & set(data.histories[row["user_id"]][-2:])
    assert data.feedback(tmp_path)["easy"].equals(tables["easy"])


def test_bare_sequences_have_no_levels(tmp_path: Path) -> None:
    write_walks(tmp_path / "little", users=8)
    data = material(tmp_path / "little", 2)
    assert data.feedback(tmp_path / "place") == {}
    assert data.leave_out == 4
    for user, history in data.histories.items():
        assert data.seen(user, 1) == set(history[:-1])
        assert data.sft_histories[int(user)] == list(history[:-4])
