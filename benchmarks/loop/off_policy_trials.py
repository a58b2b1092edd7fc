"""Off-policy intervals against known truth: 200 policies in the demo's world, each with a log of its own.

A policy serves sampled slates (Plackett-Luce over its scores, as ``Policy.sample``); another, a random change
of it, is estimated from them by policies/off_policy.py. Rewards follow the demo's users (a like at a place
has probability looked(place) * liked(user, item)), half of the worlds with tired readers: after a like above,
each place is looked at less, so that rewards depend on the slate above them. The truth is the mean of
expected rewards over many slates of the estimated policy; its own error is below a hundredth of an interval.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from align3gr.demo.world import WorldSize
from benchmarks.loop.trials import wilson
from benchmarks.loop.worlds import Floats, Ints, demo
from policies.off_policy import ESTIMATORS, Estimate, SlateLog, difference, evaluate, naive

ITEMS, PLACES = 60, 5
SLATES, USERS = 2000, 1000
TIRED = 0.6
TRUTH_SLATES = 40_000
ENOUGH = 200.0
"""``policies.gate.off_policy_min_effective``: intervals of smaller samples have no say."""


class SampledWorld:
    """Users, what they like, and a reader's way down a slate."""

    def __init__(self, seed: int) -> None:
        world = demo(seed, WorldSize(items=ITEMS, learners=USERS, evaluated=10))
        self.liked, self.looked = world.liked[:USERS], world.looked[:PLACES]

    def draw(self, scores: Floats, users: Ints, random: np.random.Generator) -> Ints:
        """A slate of each user by Gumbel top-k."""
        noisy = scores[users] + random.gumbel(size=(len(users), ITEMS))
        return np.argsort(-noisy, axis=1)[:, :PLACES]

    def propensities(self, scores: Floats, users: Ints, slates: Ints) -> Floats:
        """P(item at place | items above)."""
        weights = np.exp(scores[users] - scores[users].max(axis=1, keepdims=True))
        shown = np.take_along_axis(weights, slates, axis=1)
        above = np.cumsum(shown, axis=1) - shown
        return shown / (weights.sum(axis=1, keepdims=True) - above)

    def chances(self, users: Ints, slates: Ints) -> Floats:
        """Probability of a like at each place, of a reader who does not tire."""
        return np.asarray(self.liked[users[:, None], slates] * self.looked)

    def rewards(self, users: Ints, slates: Ints, random: np.random.Generator, *, tired: bool) -> Floats:
        """Likes, drawn."""
        chances, draws = self.chances(users, slates), random.random(slates.shape)
        found, patience = np.zeros(slates.shape), np.ones(len(users))
        for place in range(PLACES):
            found[:, place] = draws[:, place] < chances[:, place] * patience
            if tired:
                patience = np.where(found[:, place] > 0, patience * TIRED, patience)
        return found

    def truth(self, scores: Floats, random: np.random.Generator, *, tired: bool) -> float:
        """Expected liked places a slate."""
        users = np.arange(TRUTH_SLATES) % USERS
        slates = self.draw(scores, users, random)
        if not tired:
            return float(self.chances(users, slates).sum(axis=1).mean())
        chances, worth = self.chances(users, slates), np.zeros(len(users))
        # The expectation over likes above, by carrying the distribution of their number.
        states = np.zeros((len(users), PLACES + 1))
        states[:, 0] = 1.0
        powers = TIRED ** np.arange(PLACES + 1)
        for place in range(PLACES):
            liked = states * np.minimum(chances[:, [place]] * powers, 1.0)
            worth += liked.sum(axis=1)
            states = states - liked
            states[:, 1:] += liked[:, :-1]
        return float(worth.mean())


def coverage(policies: int) -> dict[str, Any]:
    """How many of the 95% intervals hold the truth, of each estimator and of the naive mean."""
    world = SampledWorld(1)
    truth = np.log(world.liked / (1 - world.liked))
    truth = (truth - truth.mean()) / truth.std()
    inside: defaultdict[str, list[bool]] = defaultdict(list)
    widths: defaultdict[str, list[float]] = defaultdict(list)
    enough: list[bool] = []
    effective: list[float] = []
    for number in range(policies):
        random = np.random.default_rng([51, number])
        tired = bool(number % 2)
        serving = 0.7 * truth + 0.7 * random.standard_normal(truth.shape)
        change = random.uniform(0.1, 1.0)
        scores = serving + change * (random.standard_normal(truth.shape) + random.uniform(-1.0, 1.0) * truth)
        users = np.arange(SLATES) % USERS
        slates = world.draw(serving, users, random)
        log = SlateLog(
            users,
            slates,
            world.rewards(users, slates, random, tired=tired),
            world.propensities(serving, users, slates),
        )
        target = world.propensities(scores, users, slates)
        other = evaluate(log, target, drawn=world.draw(scores, users, random), seed=number)
        own = evaluate(log, log.logged, drawn=world.draw(serving, users, random), seed=number)
        worth, served = (world.truth(one, random, tired=tired) for one in (scores, serving))

        def note(name: str, one: Estimate, true: float) -> None:
            inside[name].append(one.low <= true <= one.high)
            widths[name].append(one.high - one.low)

        for name in ESTIMATORS:
            note(name, other.estimates[name], worth)
        note("dr, difference", difference(other, own, "dr"), worth - served)
        note("naive mean", naive(log), worth)
        effective.append(other.effective)
        enough.append(other.effective >= ENOUGH)
    kept = np.array(enough)
    return {
        "policies": policies,
        "slates": SLATES,
        "users": USERS,
        "items": ITEMS,
        "places": PLACES,
        "effective": {
            f"{share:.0%}": float(np.quantile(effective, share)) for share in (0.0, 0.1, 0.5, 0.9, 1.0)
        },
        "enough": int(kept.sum()),
        "coverage": {
            name: {
                "all": float(np.mean(hits)),
                "all_interval": wilson(int(np.sum(hits)), len(hits)),
                "enough": float(np.array(hits)[kept].mean()) if kept.any() else None,
                "median_width": float(np.median(widths[name])),
            }
            for name, hits in inside.items()
        },
    }
