"""A small world with known tastes: items with text, users who want some of them, an old system's bias.

One idea: everything is drawn from one seed, and the utility of every item for every user is known, so that
what a policy achieves can be measured against the best that is possible. docs/demo.md describes the model.

Latent space: a theme is its genre plus its own direction; an item is its theme plus mood, maker and
something no text tells; a user wants a few themes and moods. The utility of an item for a user is

    u = SHARPNESS * cos(user, item) + QUALITY * quality(item) - DISTANCE

which align3gr/demo/reactions.py turns into reactions.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import words

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DIMENSION = 24
SHARPNESS = 6.0
QUALITY = 0.8
DISTANCE = 2.2
# What the old system pushed, unrelated to what is good: spread (sigma of a lognormal) over themes and items.
THEME_PUSH, ITEM_PUSH = 1.0, 0.8


@dataclass(frozen=True)
class WorldSize:
    """How many items and users there are."""

    items: int = 2000
    learners: int = 1200
    """Users whose feedback is learned from (the gate's and the stop users are among them)."""
    evaluated: int = 300
    """Users no round ever hears of: they judge."""
    old_slates: int = 12
    """Slates of ten that the old system showed each user before us."""


@dataclass(frozen=True)
class World:
    """Items, users and the truth about them. Learners are users ``0 .. learners-1``, then the evaluated."""

    seed: int
    size: WorldSize
    items: tuple[words.DemoItem, ...]
    item_vectors: Floats
    """[items, DIMENSION], unit length."""
    quality: Floats
    """[items], standard normal."""
    exposure: Floats
    """[items], positive, sums to 1: how the old system spread its attention."""
    user_vectors: Floats
    """[users, DIMENSION], unit length."""

    @classmethod
    def make(cls, seed: int, size: WorldSize | None = None) -> "World":
        """Draw a world; the same seed and size give the same world."""
        size = size or WorldSize()
        random = np.random.default_rng([seed, 1])
        genres = _directions(random, len(words.GENRES))
        theme_genre = np.repeat(np.arange(len(words.GENRES)), words.THEMES_PER_GENRE)
        themes = _unit(0.7 * genres[theme_genre] + 0.7 * _directions(random, len(theme_genre)))
        moods = _directions(random, len(words.MOODS))
        makers = _directions(random, len(words.MAKERS))
        item_theme = random.integers(len(themes), size=size.items)
        item_mood = random.integers(len(moods), size=size.items)
        item_maker = random.integers(len(makers), size=size.items)
        vectors = _unit(
            themes[item_theme]
            + 0.4 * moods[item_mood]
            + 0.3 * makers[item_maker]
            + 0.4 * _directions(random, size.items)
        )
        quality = random.standard_normal(size.items)
        push = THEME_PUSH * random.standard_normal(len(themes))
        exposure = np.exp(push[item_theme] + ITEM_PUSH * random.standard_normal(size.items))
        items = words.write_items(item_theme, item_mood, item_maker, random)
        users = _users(random, size.learners + size.evaluated, themes, moods)
        return cls(seed, size, items, vectors, quality, exposure / exposure.sum(), users)

    @cached_property
    def utility(self) -> Floats:
        """u of every item for every user, [users, items]."""
        closeness = self.user_vectors @ self.item_vectors.T
        return SHARPNESS * closeness + QUALITY * self.quality - DISTANCE

    @cached_property
    def item_ids(self) -> tuple[str, ...]:
        """Ids in item order."""
        return tuple(item.item_id for item in self.items)

    @cached_property
    def item_index(self) -> dict[str, int]:
        """Item id -> its row."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def learners(self) -> range:
        """Rows of the users that are learned from."""
        return range(self.size.learners)

    @cached_property
    def evaluated(self) -> range:
        """Rows of the users that judge."""
        return range(self.size.learners, self.size.learners + self.size.evaluated)

    def user_id(self, row: int) -> str:
        """Id of the user in ``row``; it names the world, so two worlds never share a user."""
        return f"user-{self.seed}-{row:05d}"


def _users(random: np.random.Generator, count: int, themes: Floats, moods: Floats) -> Floats:
    """Users want three themes, the first most, and one mood."""
    wanted = np.argsort(random.random((count, len(themes))), axis=1)[:, :3]
    weights = np.array([1.0, 0.7, 0.5])
    towards = (themes[wanted] * weights[None, :, None]).sum(axis=1)
    mood = moods[random.integers(len(moods), size=count)]
    return _unit(towards + 0.4 * mood + 0.3 * _directions(random, count))


def _directions(random: np.random.Generator, count: int) -> Floats:
    return _unit(random.standard_normal((count, DIMENSION)))


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))
