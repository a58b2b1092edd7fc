"""From an event to a feedback level: a pure function of the event and the rules.

The default rules are the industrial mapping of Align3GR (arXiv:2511.11255): dislike, hide and negative
comments -> disliked; impression without a click and short dwell -> neutral; like, share, purchase and long
dwell -> liked. Scores (rating; review and comment where they carry one) go by the scale of their ``source``;
the paper's own for public data is 1 / 2-3 / 4-5.
"""

from enum import IntEnum
from functools import cached_property
from hashlib import blake2b
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .interactions import Interaction, Kind


class Level(IntEnum):
    """Feedback level of an event or of a (user, item). Stored as int8; null says nothing by itself."""

    DISLIKED = -1
    NEUTRAL = 0
    LIKED = 1


EXPLICIT_KINDS = frozenset(
    {Kind.LIKE, Kind.DISLIKE, Kind.HIDE, Kind.SHARE, Kind.PURCHASE, Kind.RATING, Kind.REVIEW, Kind.COMMENT}
)
"""The user said so: beats anything implicit."""
IMPLICIT_KINDS = frozenset({Kind.IMPRESSION, Kind.DWELL, Kind.CLICK})
"""Seen in what the user did. ``served`` is neither: served is not seen."""
SCORED_KINDS = frozenset({Kind.RATING, Kind.REVIEW, Kind.COMMENT})
"""Their level depends on ``value`` and the scale of the source; without a value they say nothing yet."""


class RatingScale(BaseModel):
    """Which scores are liked and which disliked; between them is neutral."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    liked_from: float
    """Scores from here up are liked."""
    disliked_to: float
    """Scores down from here are disliked."""
    exclusive: bool = False
    """The two thresholds themselves are neutral (Jester: liked > 3, disliked < -3)."""

    @model_validator(mode="after")
    def _ordered(self) -> "RatingScale":
        if not self.disliked_to < self.liked_from:
            raise ValueError("disliked_to must be below liked_from")
        return self

    def level_of(self, score: float) -> Level:
        """The level of ``score`` on this scale."""
        if self.exclusive:
            liked, disliked = score > self.liked_from, score < self.disliked_to
        else:
            liked, disliked = score >= self.liked_from, score <= self.disliked_to
        return Level.LIKED if liked else Level.DISLIKED if disliked else Level.NEUTRAL


PAPER_SCALE = RatingScale(liked_from=4, disliked_to=1)


def _default_kinds() -> dict[Kind, Level | None]:
    return {
        Kind.IMPRESSION: Level.NEUTRAL,
        Kind.CLICK: None,
        Kind.LIKE: Level.LIKED,
        Kind.SHARE: Level.LIKED,
        Kind.PURCHASE: Level.LIKED,
        Kind.DISLIKE: Level.DISLIKED,
        Kind.HIDE: Level.DISLIKED,
    }


def _default_scales() -> dict[str, RatingScale]:
    return {
        "default": PAPER_SCALE,
        "movielens": RatingScale(liked_from=4, disliked_to=2.5),
        "amazon": PAPER_SCALE,
        "yelp": PAPER_SCALE,
        "jester": RatingScale(liked_from=3, disliked_to=-3, exclusive=True),
    }


class LevelRules(BaseModel):
    """How events become levels. Frozen; ``hash`` names the rules in every stored row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dwell_short_s: float = Field(5.0, ge=0)
    """A dwell of at most this many seconds is neutral: opened and left."""
    dwell_long_s: float = Field(60.0, gt=0)
    """A dwell of at least this many seconds is liked; between the two it says nothing."""
    kinds: dict[Kind, Level | None] = Field(default_factory=_default_kinds)
    """Level of the kinds that need no value. An entry here overrides the default of its kind."""
    scales: dict[str, RatingScale] = Field(default_factory=_default_scales)
    """Rating scale by ``source``; ``default`` is used for every other source. Entries override."""

    @field_validator("kinds", mode="before")
    @classmethod
    def _words_are_levels(cls, kinds: Any) -> Any:
        """Settings files say ``click: liked``; the number is as good."""
        if not isinstance(kinds, dict):
            return kinds
        words = {level.name.lower(): level for level in Level} | {"none": None}
        return {
            kind: words.get(level, level) if isinstance(level, str) else level
            for kind, level in kinds.items()
        }

    @model_validator(mode="after")
    def _complete(self) -> "LevelRules":
        if not self.dwell_short_s < self.dwell_long_s:
            raise ValueError("dwell_short_s must be below dwell_long_s")
        stray = sorted(set(self.kinds) - set(_default_kinds()))
        if stray:
            raise ValueError(
                f"the level of {stray[0]} is not a fixed one; only {', '.join(_default_kinds())}"
            )
        object.__setattr__(self, "kinds", _default_kinds() | self.kinds)
        object.__setattr__(self, "scales", _default_scales() | self.scales)
        return self

    @cached_property
    def hash(self) -> str:
        """12 hexadecimal digits over everything that decides a level."""
        rules = (
            repr((self.dwell_short_s, self.dwell_long_s))
            + repr(
                sorted(
                    (kind.value, None if level is None else int(level)) for kind, level in self.kinds.items()
                )
            )
            + repr(
                sorted((name, s.liked_from, s.disliked_to, s.exclusive) for name, s in self.scales.items())
            )
        )
        return blake2b(rules.encode(), digest_size=6).hexdigest()

    @cached_property
    def fixed(self) -> dict[Kind, Level | None]:
        """Every kind whose level needs no value, ``served`` included."""
        return {**self.kinds, Kind.SERVED: None}

    def scale_of(self, source: str | None) -> RatingScale:
        """The rating scale of ``source``, or the default one."""
        return self.scales.get(source or "default") or self.scales["default"]


def level_of(event: Interaction, rules: LevelRules) -> Level | None:
    """The feedback level of one event; None when it says nothing by itself (served, click).

    An impression is NEUTRAL provisionally: whether it counts is known when its attribution window closes.
    """
    kind = event.kind
    fixed = rules.fixed
    if kind in fixed:
        return fixed[kind]
    value = event.value
    if value is None:
        return None
    if kind is Kind.DWELL:
        if value >= rules.dwell_long_s:
            return Level.LIKED
        return Level.NEUTRAL if value <= rules.dwell_short_s else None
    return rules.scale_of(event.source).level_of(value)
