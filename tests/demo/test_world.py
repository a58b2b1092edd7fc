"""The demo's world: reproducible, with room to learn, and judged exactly."""

import numpy as np
import pytest

from align3gr.demo.past import Past, old_engagement, top
from align3gr.demo.reactions import (
    Reaction,
    examination,
    expected_liked_rate,
    liked_probability,
    react,
    reaction_probabilities,
)
from align3gr.demo.referee import Referee
from align3gr.demo.traffic import ShownSlate, past_events, slate_events
from align3gr.demo.world import World, WorldSize
from features.interactions import Kind, decode_interaction, encode_interaction
from features.levels import Level, LevelRules, level_of
from policies.lists import Recommendation

SMALL = WorldSize(items=400, learners=200, evaluated=100, old_slates=8)


@pytest.fixture(scope="module")
def world() -> World:
    return World.make(3, SMALL)


@pytest.fixture(scope="module")
def past(world: World) -> Past:
    return old_engagement(world)


def test_the_same_seed_gives_the_same_world_and_the_same_past(world: World, past: Past) -> None:
    again = World.make(3, SMALL)
    assert again.items == world.items
    assert np.array_equal(again.utility, world.utility)
    assert np.array_equal(old_engagement(again).items, past.items)
    assert World.make(4, SMALL).items != world.items


def test_every_item_has_an_id_of_its_own_and_text() -> None:
    items = World.make(1).items
    assert len({item.item_id for item in items}) == len(items) >= 2000
    assert all(item.title and item.theme in item.text and item.mood in item.text for item in items)


def test_reaction_probabilities_sum_to_one_and_better_items_are_liked_more() -> None:
    utility = np.linspace(-6, 6, 50)
    assert np.allclose(reaction_probabilities(utility).sum(axis=-1), 1.0)
    assert np.all(np.diff(liked_probability(utility)) > 0)
    assert np.all(np.diff(reaction_probabilities(utility)[:, Reaction.DISLIKE]) < 0)


def test_drawn_reactions_follow_the_documented_probabilities() -> None:
    utility = np.full((20_000, 10), 0.3)
    drawn = react(utility, np.random.default_rng(0))
    seen = (drawn != Reaction.UNSEEN).mean(axis=0)
    # 20,000 draws: a standard error of at most 0.0036; four of them.
    assert np.allclose(seen, examination(np.arange(1, 11)), atol=0.015)
    given = drawn[drawn != Reaction.UNSEEN]
    shares = np.bincount(given, minlength=6) / len(given)
    assert np.allclose(shares, reaction_probabilities(np.array(0.3)), atol=0.01)
    liked = np.isin(drawn, (Reaction.LIKE, Reaction.READ)).mean()
    assert liked == pytest.approx(float(expected_liked_rate(utility[:1])[0]), abs=0.005)


def test_the_oracle_is_best_and_popularity_beats_chance(world: World, past: Past) -> None:
    referee = Referee(world, past)
    likes = np.bincount(past.items[past.users < SMALL.learners], minlength=SMALL.items).astype(float)
    popular = referee.popularity(likes)
    assert referee.random < popular < referee.oracle
    # Room to learn: the old favourites are far from what users want.
    assert referee.oracle > 2 * popular


def test_a_list_is_worth_its_expected_likes_and_a_short_one_less(world: World, past: Past) -> None:
    referee = Referee(world, past)
    truth = world.utility[list(world.evaluated)]
    unseen = truth.copy()
    for row, history in enumerate(past.histories(world.evaluated)):
        unseen[row, history] = -np.inf
    lists = [
        [
            Recommendation(world.item_ids[item], 0.0, place, None, "policy")
            for place, item in enumerate(row, start=1)
        ]
        for row in top(unseen, 10).tolist()
    ]
    assert referee.liked_rate(lists) == pytest.approx(referee.oracle)
    assert referee.liked_rate([one[:5] for one in lists]) < referee.oracle
    assert 0 < referee.coverage(lists) <= 1


def test_top_finds_the_highest_in_order() -> None:
    scores = np.random.default_rng(1).random((5, 40))
    assert np.array_equal(top(scores, 7), np.argsort(-scores, axis=1)[:, :7])


def test_the_past_holds_only_learners_likes_and_valid_events(world: World, past: Past) -> None:
    now = 1_800_000_000.0
    events = list(past_events(world, past, now))
    assert {event.user_id for event in events} <= {world.user_id(row) for row in world.learners}
    assert {event.kind for event in events} == {Kind.LIKE, Kind.CLICK, Kind.DWELL}
    assert max(event.occurred_at.timestamp() for event in events) < now
    assert len({(event.user_id, event.event_id) for event in events}) == len(events)


@pytest.mark.parametrize(
    ("reaction", "level"),
    [
        (Reaction.LIKE, Level.LIKED),
        (Reaction.READ, Level.LIKED),
        (Reaction.SKIM, Level.NEUTRAL),
        (Reaction.DISLIKE, Level.DISLIKED),
        (Reaction.HIDE, Level.DISLIKED),
        (Reaction.NOTHING, Level.NEUTRAL),
        (Reaction.UNSEEN, None),
    ],
)
def test_each_reaction_becomes_events_of_its_level(
    world: World, reaction: Reaction, level: Level | None
) -> None:
    shown = [Recommendation(world.item_ids[0], -1.0, 1, 0.25, "policy")]
    slate = ShownSlate(0, "r1", "v1", shown, np.array([reaction], np.int8), 1_800_000_000.0)
    events = [
        decode_interaction(encode_interaction(event), now=event.occurred_at)
        for event in slate_events(world, slate)
    ]
    assert events[0].kind == Kind.SERVED
    assert (events[0].position, events[0].propensity, events[0].policy_version) == (1, 0.25, "v1")
    assert all(event.request_id == "r1" for event in events)
    strongest = [level_of(event, LevelRules()) for event in events[2:]] or [
        level_of(event, LevelRules()) for event in events[1:]
    ]
    assert [found for found in strongest if found is not None] == ([] if level is None else [level])
