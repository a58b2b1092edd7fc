"""Worlds whose truth is known, for closed loops: what each user would do with each item.

``jester``: 7,200 people who rated all of 100 jokes (ratings -10..10; liked above 3, disliked below -3), so a
reaction is the rating itself. ``demo``: the built-in world (align3gr/demo/world.py), whose reactions are
drawn from the model in align3gr/demo/reactions.py.

Each starts with a past: an old system pushed some items, for reasons unrelated to what is good, and kept only
what was liked of them.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align3gr.demo.past import old_engagement, top
from align3gr.demo.reactions import Reaction, examination, liked_probability, react
from align3gr.demo.world import World, WorldSize
from features.catalogue import Item

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Levels = NDArray[np.int8]

UNSEEN = -2
"""In place of a level: the user did not look at that position."""

JESTER_SHOWN = 10
JESTER_PUSH = 1.0
"""Sigma of the lognormal by which the old system spread its attention over jokes."""


@dataclass(frozen=True)
class LoopWorld:
    """Users ``0 .. users-1``: learners first, then judges, of whom no round hears."""

    name: str
    items: tuple[Item, ...]
    learners: range
    judges: range
    places: int
    """Items of a slate."""
    liked: Floats
    """[users, items]: probability that a user who looks at the item likes it."""
    past: tuple[tuple[int, ...], ...]
    """What each user liked before, oldest first; rows of ``items``."""
    met: NDArray[np.bool_]
    """[users, items]: what must not be recommended to the user at the start."""
    looked: Floats
    """[places]: probability that a position is looked at."""
    react: Callable[[Ints, Ints, np.random.Generator], Levels]
    """(users [n], slates [n, places], random) -> 1 liked, 0 neutral, -1 disliked, UNSEEN."""

    def user_id(self, row: int) -> str:
        """Id of the user in ``row``."""
        return f"{self.name}-{row:05d}"

    def worth(self, slates: Ints) -> float:
        """Expected share of the judges' slates [judges, places] (-1: an empty place) that ends up liked."""
        rows = np.asarray(self.judges)[:, None]
        liked = np.where(slates >= 0, self.liked[rows, slates], 0.0)
        return float((liked * self.looked).mean())

    def best(self, scores: Floats, rows: range) -> Ints:
        """The highest ``scores`` [rows, items] of what these users have not met, [rows, places]."""
        return top(np.where(self.met[rows.start : rows.stop], -np.inf, scores), self.places)

    @cached_property
    def oracle(self) -> float:
        """Ranks by the truth."""
        return self.worth(self.best(self.liked[self.judges.start :], self.judges))

    @cached_property
    def chance(self) -> float:
        """Draws evenly from what is not met, in expectation."""
        free = ~self.met[self.judges.start :]
        liked = self.liked[self.judges.start :]
        each = (liked * free).sum(axis=1) / free.sum(axis=1)
        return float(each.mean() * self.looked.mean())

    @cached_property
    def ceiling(self) -> float:
        """Ridge regression from the past to the truth, fitted to *everything* every learner thinks of every
        item: about what the judges' fixed histories tell at all."""
        told = self._told()
        count = len(self.learners)
        x, y = told[:count], self.liked[:count]
        weights = np.linalg.solve(x.T @ x + 20.0 * np.eye(x.shape[1]), x.T @ y)
        return self.worth(self.best(told[count:] @ weights, self.judges))

    def _told(self) -> Floats:
        """[users, items + 1]: which items the past holds, and a one."""
        told = np.zeros((len(self.past), len(self.items) + 1))
        told[:, -1] = 1.0
        for row, items in enumerate(self.past):
            told[row, list(items)] = 1.0
        return told


def jester(folder: Path, seed: int, *, learners: int | None = None, judges: int = 1000) -> LoopWorld:
    """``folder`` holds ``ratings.npz`` and ``jokes.jsonl.gz``; the seed draws who judges and the past."""
    ratings = np.load(folder / "ratings.npz")["ratings"].astype(np.float64) / 100
    with gzip.open(folder / "jokes.jsonl.gz", "rt", encoding="utf-8") as file:
        jokes = [json.loads(line) for line in file]
    random = np.random.default_rng([seed, 11])
    count = len(ratings) - judges if learners is None else learners
    ratings = ratings[random.permutation(len(ratings))[: count + judges]]
    push = JESTER_PUSH * random.standard_normal(ratings.shape[1])
    shown = top(push + random.gumbel(size=ratings.shape), JESTER_SHOWN)
    met = np.zeros(ratings.shape, dtype=bool)
    np.put_along_axis(met, shown, True, axis=1)
    past = tuple(
        tuple(item for item in row.tolist() if ratings[user, item] > 3) for user, row in enumerate(shown)
    )
    levels = np.where(ratings > 3, 1, np.where(ratings < -3, -1, 0)).astype(np.int8)

    def react_(users: Ints, slates: Ints, _: np.random.Generator) -> Levels:
        return levels[users[:, None], slates]

    return LoopWorld(
        name="jester",
        items=tuple(Item(item_id=f"joke-{joke['id']:03d}", text=joke["text"]) for joke in jokes),
        learners=range(count),
        judges=range(count, count + judges),
        places=5,
        liked=(ratings > 3).astype(np.float64),
        past=past,
        met=met,
        looked=np.ones(5),
        react=react_,
    )


def demo(seed: int, size: WorldSize | None = None) -> LoopWorld:
    """The built-in world."""
    world = World.make(seed, size)
    users = world.size.learners + world.size.evaluated
    past = tuple(tuple(items) for items in old_engagement(world).histories(range(users)))
    met = np.zeros(world.utility.shape, dtype=bool)
    for row, items in enumerate(past):
        met[row, list(items)] = True
    level = np.array([1, 1, 0, -1, -1, 0, UNSEEN], dtype=np.int8)  # of Reaction; the last place is -1

    def react_(users: Ints, slates: Ints, random: np.random.Generator) -> Levels:
        drawn = react(np.take_along_axis(world.utility[users], slates, axis=1), random)
        return np.asarray(level[drawn])

    assert (level[Reaction.UNSEEN], level[Reaction.SKIM], level[Reaction.HIDE]) == (UNSEEN, 0, -1)
    return LoopWorld(
        name="demo",
        items=tuple(
            Item(item_id=one.item_id, title=one.title, text=one.text, categories=(one.genre,))
            for one in world.items
        ),
        learners=world.learners,
        judges=world.evaluated,
        places=10,
        liked=liked_probability(world.utility),
        past=past,
        met=met,
        looked=examination(np.arange(1, 11)),
        react=react_,
    )
