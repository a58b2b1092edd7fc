"""Events to levels: the paper's industrial mapping and the scales of the public data."""

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from features import Interaction, Kind, Level, LevelRules, level_of
from features.levels import EXPLICIT_KINDS, IMPLICIT_KINDS, RatingScale

LIKED, NEUTRAL, DISLIKED = Level.LIKED, Level.NEUTRAL, Level.DISLIKED


def event(kind: Kind, value: float | None = None, source: str | None = None) -> Interaction:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Interaction(
        event_id="e", user_id="u", item_id="i", kind=kind, occurred_at=at, value=value, source=source
    )


@pytest.mark.parametrize(
    ("kind", "value", "source", "level"),
    [
        (Kind.SERVED, None, None, None),
        (Kind.CLICK, None, None, None),
        (Kind.IMPRESSION, None, None, NEUTRAL),
        (Kind.LIKE, None, None, LIKED),
        (Kind.SHARE, None, None, LIKED),
        (Kind.PURCHASE, 19.9, None, LIKED),
        (Kind.DISLIKE, None, None, DISLIKED),
        (Kind.HIDE, None, None, DISLIKED),
        (Kind.DWELL, 5, None, NEUTRAL),
        (Kind.DWELL, 30, None, None),
        (Kind.DWELL, 60, None, LIKED),
        (Kind.DWELL, None, None, None),
        (Kind.RATING, 5, None, LIKED),
        (Kind.RATING, 4, None, LIKED),
        (Kind.RATING, 3, None, NEUTRAL),
        (Kind.RATING, 2, None, NEUTRAL),
        (Kind.RATING, 1, None, DISLIKED),
        (Kind.RATING, None, None, None),
        (Kind.RATING, 2, "a source without a scale", NEUTRAL),
        (Kind.RATING, 4, "movielens", LIKED),
        (Kind.RATING, 3.5, "movielens", NEUTRAL),
        (Kind.RATING, 3, "movielens", NEUTRAL),
        (Kind.RATING, 2.5, "movielens", DISLIKED),
        (Kind.RATING, 2, "amazon", NEUTRAL),
        (Kind.RATING, 1, "yelp", DISLIKED),
        (Kind.RATING, 3.01, "jester", LIKED),
        (Kind.RATING, 3, "jester", NEUTRAL),
        (Kind.RATING, -3, "jester", NEUTRAL),
        (Kind.RATING, -3.01, "jester", DISLIKED),
        (Kind.REVIEW, None, "amazon", None),
        (Kind.REVIEW, 5, "amazon", LIKED),
        (Kind.COMMENT, None, None, None),
        (Kind.COMMENT, 1, None, DISLIKED),
    ],
)
def test_the_level_of_an_event(
    kind: Kind, value: float | None, source: str | None, level: Level | None
) -> None:
    assert level_of(event(kind, value, source), LevelRules()) is level


def test_every_kind_but_served_is_explicit_or_implicit() -> None:
    assert frozenset(Kind) - {Kind.SERVED} == EXPLICIT_KINDS | IMPLICIT_KINDS
    assert not EXPLICIT_KINDS & IMPLICIT_KINDS


def test_rules_override_single_entries_and_keep_the_other_defaults() -> None:
    rules = LevelRules(
        kinds={Kind.CLICK: LIKED}, scales={"stars10": RatingScale(liked_from=8, disliked_to=3)}
    )
    assert level_of(event(Kind.CLICK), rules) is LIKED
    assert level_of(event(Kind.HIDE), rules) is DISLIKED
    assert level_of(event(Kind.RATING, 7, "stars10"), rules) is NEUTRAL
    assert level_of(event(Kind.RATING, 2.5, "movielens"), rules) is DISLIKED


def test_rules_may_be_written_in_words() -> None:
    words = LevelRules.model_validate({"kinds": {"click": "liked", "hide": "neutral", "share": "none"}})
    assert [words.kinds[kind] for kind in (Kind.CLICK, Kind.HIDE, Kind.SHARE)] == [LIKED, NEUTRAL, None]
    assert words.hash == LevelRules(kinds={Kind.CLICK: LIKED, Kind.HIDE: NEUTRAL, Kind.SHARE: None}).hash


def test_the_hash_names_the_rules() -> None:
    assert LevelRules().hash == LevelRules().hash
    assert len(LevelRules().hash) == 12
    others = [
        LevelRules(dwell_short_s=4),
        LevelRules(dwell_long_s=61),
        LevelRules(kinds={Kind.CLICK: NEUTRAL}),
        LevelRules(scales={"x": RatingScale(liked_from=4, disliked_to=1)}),
        LevelRules(scales={"jester": RatingScale(liked_from=3, disliked_to=-3)}),
    ]
    assert len({LevelRules().hash, *(rules.hash for rules in others)}) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        {"dwell_short_s": 60, "dwell_long_s": 60},
        {"kinds": {"served": 0}},
        {"kinds": {"rating": 1}},
        {"kinds": {"click": "adored"}},
        {"scales": {"x": {"liked_from": 1, "disliked_to": 4}}},
        {"scale": {}},
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LevelRules.model_validate(wrong)
