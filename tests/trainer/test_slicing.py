"""Slices of users and items, and the gate's figures over them."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from policies.policy import Policy
from policies.settings import GateSettings
from tests.policies.factory import item_ids, write_tiny_policy
from trainer.cases import RankingCase
from trainer.evaluation import rank_catalogue
from trainer.gate_figures import gate_figures
from trainer.slates import SlateCase
from trainer.slicing import item_slices, sliced, user_slices

SETTINGS = GateSettings(new_history=2, heavy_history=4, young_days=10)
NOW = datetime(2026, 6, 1, tzinfo=UTC)
NAMES = item_ids(200)


def test_users_are_new_or_heavy_by_the_history_in_their_prompt() -> None:
    found = user_slices([0, 2, 3, 4, 9], SETTINGS)
    assert found["new users"].tolist() == [True, True, False, False, False]
    assert found["heavy users"].tolist() == [False, False, False, True, True]


def test_deciles_hold_every_eligible_item_once_the_most_popular_in_the_tenth() -> None:
    eligible = [f"i{number}" for number in range(25)]
    popularity = ["gone", *reversed(eligible[5:])]
    found = item_slices(popularity, eligible, {}, now=None, settings=SETTINGS)
    deciles = [found[f"popularity decile {one}"] for one in range(1, 11)]
    assert sorted(item for part in deciles for item in part) == sorted(eligible)
    assert {"i24", "i23"} <= deciles[9]
    assert deciles[0] <= set(eligible[:5])  # nobody liked these yet
    assert "young items" not in found


def test_items_are_young_for_a_while_after_they_came() -> None:
    loaded = {f"i{number}": NOW - timedelta(days=number * 4) for number in range(8)}
    found = item_slices([], list(loaded), loaded, now=NOW, settings=SETTINGS)
    assert found["young items"] == {"i0", "i1", "i2"}
    fresh = dict.fromkeys(loaded, NOW)  # a catalogue that was just loaded is not young: it is new
    assert "young items" not in item_slices([], list(fresh), fresh, now=NOW, settings=SETTINGS)


def test_values_are_averaged_by_user_within_a_slice() -> None:
    cases = [("a", "u"), ("b", "u"), ("a", "v"), ("c", "v"), ("a", "stranger")]
    found = sliced(
        "full", cases, [1.0, 0.5, 0.2, 0.9, 7.0], {"x": {"a", "b"}, "y": {"c"}, "z": {"d"}}, ["u", "v"]
    )
    assert found["full/x"].tolist() == [0.75, 0.2]
    np.testing.assert_array_equal(found["full/y"], [np.nan, 0.9])
    assert "full/z" not in found


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return Policy.load(write_tiny_policy(tmp_path_factory.mktemp("policies") / "v1"))


def test_a_slice_of_everything_has_the_figures_of_the_whole_and_own_measures_stand_beside(
    policy: Policy,
) -> None:
    slates = [SlateCase("s", (NAMES[0],), tuple(NAMES[20:26]), (1, 1, 0, 0, -1, None))]
    ranking = [RankingCase("u", (NAMES[1],), NAMES[2]), RankingCase("u", (NAMES[1],), NAMES[3])]
    figures = gate_figures(
        policy,
        slates,
        ranking,
        ("s", "u"),
        eligible=NAMES,
        parts={"all": frozenset(NAMES), "one": frozenset({NAMES[3]})},
        measures={"length": lambda _, lists: {user: float(len(items)) for user, items in lists.items()}},
    )
    for metric in ("slate", "full"):
        np.testing.assert_allclose(figures.item_slices[f"{metric}/all"], figures.per_user[metric])
    only = rank_catalogue(policy, ranking[1:], cutoffs=(10,), eligible=NAMES)
    assert figures.item_slices["full/one"][1] == only.per_user["ndcg@10"][0]
    assert "slate/one" not in figures.item_slices
    assert figures.per_user["own:length"].tolist() == [10.0, 10.0]
