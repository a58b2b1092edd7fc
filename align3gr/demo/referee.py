"""What a list is worth in the world, exactly: expected liked rates on users that no round learns from.

Their histories are fixed and nothing they are shown is used up, so every round is judged on the same
question, and the answer has no luck in it: it is the model's own probability, not a draw.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from policies.lists import Recommendation, UserContext

from .past import SLATE, Past, top
from .reactions import examination, expected_liked_rate, liked_probability
from .world import World

Floats = NDArray[np.float64]


class Referee:
    """Judges lists of ten for the evaluated users of a world."""

    def __init__(self, world: World, past: Past) -> None:
        self.world = world
        self._rows = list(world.evaluated)
        self._histories = past.histories(world.evaluated)

    @cached_property
    def contexts(self) -> list[UserContext]:
        """The evaluated users as a policy sees them."""
        ids = self.world.item_ids
        return [
            UserContext(
                self.world.user_id(row), tuple(ids[i] for i in history), frozenset(ids[i] for i in history)
            )
            for row, history in zip(self._rows, self._histories, strict=True)
        ]

    def liked_rate(self, lists: Sequence[Sequence[Recommendation]]) -> float:
        """Expected share of the lists' items that end up liked; a short list loses its empty places."""
        rates = []
        for row, one in zip(self._rows, lists, strict=True):
            items = [self.world.item_index[found.item_id] for found in one]
            utility = self.world.utility[row, items]
            rates.append(float(expected_liked_rate(utility[None, :])[0]) * len(items) / SLATE)
        return float(np.mean(rates))

    def coverage(self, lists: Sequence[Sequence[Recommendation]]) -> float:
        """Share of the catalogue that is in some list."""
        return len({found.item_id for one in lists for found in one}) / len(self.world.items)

    @cached_property
    def oracle(self) -> float:
        """Ranks by the true utility: nothing can be better."""
        return self._by_score(self._truth)

    @cached_property
    def random(self) -> float:
        """Ten items drawn evenly from those not in the history, in expectation."""
        positions = np.arange(1, SLATE + 1)
        liked = liked_probability(self._truth)
        unseen = self._unseen
        means = (liked * unseen).sum(axis=1) / unseen.sum(axis=1)
        return float(means.mean() * examination(positions).mean())

    def popularity(self, likes: Floats) -> float:
        """The most liked items that are not in the history; ``likes`` [items] counts."""
        return self._by_score(np.tile(likes, (len(self._rows), 1)))

    @cached_property
    def _truth(self) -> Floats:
        return np.asarray(self.world.utility[self._rows])

    @cached_property
    def _unseen(self) -> NDArray[np.bool_]:
        unseen = np.ones((len(self._rows), len(self.world.items)), bool)
        for row, history in enumerate(self._histories):
            unseen[row, history] = False
        return unseen

    def _by_score(self, scores: Floats) -> float:
        chosen = top(np.where(self._unseen, scores, -np.inf), SLATE)
        return float(expected_liked_rate(np.take_along_axis(self._truth, chosen, axis=1)).mean())
