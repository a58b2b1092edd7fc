"""How users react to what they are shown: the documented model behind the demo's feedback.

A user examines position ``p`` (1 = first) with probability ``1 / (1 + 0.08 (p - 1))``: only then is there an
``impression``. Who examines an item of utility ``u`` does one of six things, a multinomial logit:

    like        exp(u)               explicit, liked
    read        exp(u - 0.7)         click, then a dwell of over a minute: liked
    skim        exp(0.2 u - 0.8)     click, then a dwell of seconds: neutral
    dislike     exp(-2.0 - 0.7 u)    explicit, disliked
    hide        exp(-2.8 - 0.7 u)    explicit, disliked
    nothing     exp(0.8)             the impression stays without an answer: neutral
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POSITION_COST = 0.08


class Reaction(IntEnum):
    """What a user did with one served item."""

    UNSEEN = -1
    LIKE = 0
    READ = 1
    SKIM = 2
    DISLIKE = 3
    HIDE = 4
    NOTHING = 5


# Intercept and slope in u of each reaction's log weight, in the order of Reaction from LIKE on.
_INTERCEPTS = np.array([0.0, -0.7, -0.8, -2.0, -2.8, 0.8])
_SLOPES = np.array([1.0, 1.0, 0.2, -0.7, -0.7, 0.0])


def examination(positions: Ints) -> Floats:
    """Probability that a position (1 = first) is looked at; same shape."""
    return np.asarray(1.0 / (1.0 + POSITION_COST * (positions - 1)))


def reaction_probabilities(utility: Floats) -> Floats:
    """Of an examined item: [..., 6] over LIKE .. NOTHING for utilities [...]."""
    weights = np.exp(_INTERCEPTS + _SLOPES * utility[..., None])
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def liked_probability(utility: Floats) -> Floats:
    """Probability that an examined item ends up liked (like or read); same shape."""
    return np.asarray(reaction_probabilities(utility)[..., :2].sum(axis=-1))


def expected_liked_rate(utility: Floats) -> Floats:
    """Expected share of a slate that ends up liked, [users], for utilities [users, k] in order."""
    positions = np.arange(1, utility.shape[1] + 1)
    return np.asarray((liked_probability(utility) * examination(positions)).mean(axis=1))


def react(utility: Floats, random: np.random.Generator) -> NDArray[np.int8]:
    """Draw a Reaction for every served item; ``utility`` [users, k] in slate order, result the same shape."""
    positions = np.arange(1, utility.shape[1] + 1)
    seen = random.random(utility.shape) < examination(positions)
    cumulated = reaction_probabilities(utility).cumsum(axis=-1)
    drawn = (random.random(utility.shape)[..., None] > cumulated).sum(axis=-1).clip(max=Reaction.NOTHING)
    return np.where(seen, drawn, Reaction.UNSEEN).astype(np.int8)
