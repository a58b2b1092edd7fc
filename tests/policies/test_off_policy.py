"""Off-policy estimators against exact truth: every ordered slate of a small catalogue is enumerated."""

from itertools import permutations

import numpy as np
import pytest

from policies.errors import PoliciesError
from policies.off_policy import RewardModel, SlateLog, difference, effective_number, evaluate, naive

ITEMS, PLACES = 5, 3
SLATES = np.array(list(permutations(range(ITEMS), PLACES)))
LIKED = np.array([0.9, 0.7, 0.5, 0.3, 0.1])
EXAMINED = np.array([1.0, 0.8, 0.6])


def propensities(q: np.ndarray, slates: np.ndarray = SLATES) -> np.ndarray:
    """Plackett-Luce: P(item at place | places before), as Policy.sample logs it."""
    shown = q[slates]
    before = np.cumsum(shown, axis=1) - shown
    return shown / (1.0 - before)


def expected(slates: np.ndarray, *, cascade: bool) -> np.ndarray:
    """Expected reward of each place; ``cascade``: a reader tires of what stands above."""
    rewards = LIKED[slates] * EXAMINED
    if cascade:
        above = np.cumsum(LIKED[slates], axis=1) - LIKED[slates]
        rewards = rewards * 0.7**above
    return rewards


SERVED = np.array([0.2, 0.2, 0.2, 0.2, 0.2])
OTHER = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("estimator", ["ips", "cascade"])
def test_the_weighted_mean_over_all_slates_is_exactly_the_other_policys_worth(
    estimator: str, cascade: bool
) -> None:
    logged, target = propensities(SERVED), propensities(OTHER)
    rewards = expected(SLATES, cascade=cascade)
    truth = float((target.prod(axis=1) * rewards.sum(axis=1)).sum())
    served = logged.prod(axis=1)  # every slate once, weighted by how often it is served
    log = SlateLog(np.arange(len(SLATES)), SLATES, rewards * served[:, None] * len(SLATES), logged)
    assert served.sum() == pytest.approx(1.0)
    assert evaluate(log, target).estimates[estimator].value == pytest.approx(truth, rel=1e-12)


def draw(q: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    return np.argsort(-(np.log(q) + random.gumbel(size=(count, ITEMS))), axis=1)[:, :PLACES]


def logged(count: int, seed: int, users: int | None = None) -> SlateLog:
    random = np.random.default_rng(seed)
    slates = draw(SERVED, count, random)
    rewards = (random.random(slates.shape) < expected(slates, cascade=False)).astype(float)
    return SlateLog(np.arange(count) % (users or count), slates, rewards, propensities(SERVED, slates))


TRUTH = float((propensities(OTHER).prod(axis=1) * expected(SLATES, cascade=False).sum(axis=1)).sum())


def test_intervals_cover_the_truth_and_the_naive_means_does_not() -> None:
    covered, plain = dict.fromkeys(["ips", "cascade", "snips", "dr"], 0), 0
    for seed in range(60):
        log = logged(600, seed, users=200)
        drawn = draw(OTHER, 600, np.random.default_rng([seed, 1]))
        found = evaluate(log, propensities(OTHER, log.items), drawn=drawn)
        for name, one in found.estimates.items():
            covered[name] += one.low <= TRUTH <= one.high
        plain += naive(log).low <= TRUTH <= naive(log).high
    # 95% intervals: fewer than 52 of 60 have probability 1%.
    assert min(covered.values()) >= 52, covered
    assert plain <= 10


def test_the_doubly_robust_interval_is_narrower_than_plain_weighting() -> None:
    log = logged(2000, 3)
    found = evaluate(
        log, propensities(OTHER, log.items), drawn=draw(OTHER, 2000, np.random.default_rng(4))
    ).estimates
    width = {name: one.high - one.low for name, one in found.items()}
    assert width["dr"] < width["cascade"] < width["ips"]


def test_a_policy_against_itself_differs_by_nothing() -> None:
    log = logged(500, 5)
    same = evaluate(log, log.logged, drawn=log.items)
    assert same.effective == 500
    apart = difference(same, same, "dr")
    assert (apart.value, apart.low, apart.high) == (0.0, 0.0, 0.0)
    assert same.estimates["snips"].value == pytest.approx(naive(log).value)


def test_a_better_policy_is_found_better_than_the_one_that_served() -> None:
    log = logged(3000, 6)
    drawn = draw(OTHER, 3000, np.random.default_rng(7))
    better = evaluate(log, propensities(OTHER, log.items), drawn=drawn)
    served = evaluate(log, log.logged, drawn=draw(SERVED, 3000, np.random.default_rng(8)))
    assert difference(better, served, "dr").low > 0
    assert 0 < better.effective < 3000


def test_slates_of_other_lengths_and_impossible_items_are_told_apart() -> None:
    log = SlateLog(
        users=np.array([0, 1, 1]),
        items=np.array([[0, 1], [2, -1], [1, 0]]),
        rewards=np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        logged=np.array([[0.5, 0.5], [0.5, np.nan], [0.5, 0.5]]),
    )
    found = evaluate(log, np.array([[0.5, 0.5], [0.25, np.nan], [0.0, 0.0]])).estimates
    assert found["cascade"].value == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    nothing = evaluate(log, np.where(np.isnan(log.logged), np.nan, 0.0))
    assert nothing.effective == 0.0
    assert set(nothing.estimates) == {"ips", "cascade"}


def test_the_reward_model_learns_places_and_items() -> None:
    log = logged(20_000, 9)
    model = RewardModel(log.items, log.rewards, ITEMS)
    assert model(SLATES) == pytest.approx(expected(SLATES, cascade=False), abs=0.06)
    assert model(np.array([[-1, 0]]))[0, 0] == 0.0


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5])
def test_impossible_propensities_are_refused(bad: float) -> None:
    with pytest.raises(PoliciesError, match="above 0 and at most at 1"):
        SlateLog(np.zeros(1, int), np.zeros((1, 1), int), np.zeros((1, 1)), np.full((1, 1), bad))


def test_one_user_is_not_enough_and_shapes_must_agree() -> None:
    log = logged(10, 1, users=1)
    with pytest.raises(PoliciesError, match="two users"):
        evaluate(log, log.logged)
    with pytest.raises(PoliciesError, match="shape"):
        evaluate(logged(10, 1), np.ones((10, 1)))


def test_equal_weights_are_worth_all_slates() -> None:
    assert effective_number(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_number(np.array([1.0, 0.0, 0.0])) == 1.0
