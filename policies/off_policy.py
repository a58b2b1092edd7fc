"""What another policy would have earned on sampled slates, from logged propensities alone.

A slate i shows items y_1 .. y_T (T may differ), drawn by ``Policy.sample`` of the policy that served it with
the logged propensities p_t = P(y_t | x, y_1 .. y_{t-1}); pi_t is the same under the policy in question and
w_t = prod_{s<=t} pi_s / p_s. The reward r_t is 1 where the item at place t came to be liked, else 0 (also
where it was not seen). The worth of a policy is its expected sum of rewards a slate, E[sum_t r_t].

- **IPS**      mean_i of w_T sum_t r_t. Unbiased whatever rewards depend on; each place adds variance.
- **Cascade**  mean_i of sum_t w_t r_t. Unbiased where a reward does not depend on what stands *below* it
  (people read from the top): McInerney et al., KDD 2020, "reward interaction IPS".
- **SNIPS**    the same with each place normalised by its own weights, sum_t (sum_i w_t r_t / sum_i w_t):
  Swaminathan & Joachims 2015; a bias of order 1/n buys a far smaller variance.
- **DR**       mean_i of sum_t m(y'_t, t) + sum_t (sum_i w_t (r_t - m(y_t, t)) / sum_i w_t): a model of
  rewards m, asked about a slate y' drawn from the policy in question for the same user, corrected by the
  weighted residuals of what was really shown (after Kiyohara et al., WSDM 2022). Right when the weights are,
  whatever m is; and when m is, whatever the weights are.

The reward model is m(y, t) = e_t a_y: the rate of place t times the item's, which is its likes over what its
places let expect, shrunk towards 1 (``RewardModel``); fitted on other users than it is asked about (folds).

Intervals: estimates are ratios of means, so each slate has an influence (delta method); slates of one user
are added up, and the interval is Student's over users. The *effective number* of slates is (sum w_T)^2 / sum
w_T^2: where it is small, a few slates speak for all and the interval is not to be trusted.

Why no library: obp, the reference for these estimators, has slates but does not install on a Python that we
support (0.5.7: <3.11); scope-rl is for trajectories, not slates. Here is what is needed, proven against exact
truth.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

from .errors import PoliciesError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ESTIMATORS = ("ips", "cascade", "snips", "dr")
SHRINKAGE = 5.0
"""Expected likes that an item's own rate must outweigh."""
FOLDS = 5


@dataclass(frozen=True)
class SlateLog:
    """n sampled slates of up to T places, and what one policy makes of them. Places behind a slate's end: NaN
    propensities, item -1."""

    users: Ints
    """[n] number of the user, 0 .. users - 1."""
    items: Ints
    """[n, T] number of the item."""
    rewards: Floats
    """[n, T] 1 liked, else 0."""
    logged: Floats
    """[n, T] propensity of each item given those above it, as logged."""

    def __post_init__(self) -> None:
        shown = ~np.isnan(self.logged)
        if np.any(self.logged[shown] <= 0) or np.any(self.logged[shown] > 1 + 1e-9):
            raise PoliciesError("logged propensities must lie above 0 and at most at 1")
        if not (
            self.items.shape == self.rewards.shape == self.logged.shape and len(self.users) == len(self.items)
        ):
            raise PoliciesError(
                "slates, rewards and propensities must have one shape, users one entry a slate"
            )


@dataclass(frozen=True)
class Estimate:
    """A worth, or a difference of two."""

    value: float
    low: float
    high: float
    """Ends of the 95% interval."""


@dataclass(frozen=True)
class Evaluation:
    """One policy, by every estimator, with what is needed to compare it with another on the same slates."""

    estimates: Mapping[str, Estimate]
    effective: float
    influences: Mapping[str, Floats]
    """Estimator -> [users] influence of each user on the estimate; they sum to 0."""


def evaluate(log: SlateLog, target: Floats, *, drawn: Ints | None = None, seed: int = 0) -> Evaluation:
    """The worth of a policy with propensities ``target`` [n, T] (``propensity.slate_propensities``).

    ``drawn`` [n, T']: the items of one slate of the policy for each logged slate's user (-1: none), for DR;
    without it there is no DR. Raises PoliciesError for shapes that differ and for fewer than two users.
    """
    if target.shape != log.logged.shape:
        raise PoliciesError("the policy's propensities must have the shape of the logged ones")
    users = int(log.users.max()) + 1 if len(log.users) else 0
    if users < 2:
        raise PoliciesError("sampled slates of at least two users are needed to tell how sure an estimate is")
    shown = ~np.isnan(log.logged)
    ratios = np.where(shown, target / np.where(shown, log.logged, 1.0), 1.0)
    weights: Floats = np.cumprod(ratios, axis=1, dtype=np.float64)
    rewards = np.where(shown, log.rewards, 0.0)
    whole = weights[:, -1] * rewards.sum(axis=1)
    cascade = (weights * rewards).sum(axis=1)
    each = {
        "ips": (whole.mean(), whole - whole.mean()),
        "cascade": (cascade.mean(), cascade - cascade.mean()),
    }
    if np.all(weights.sum(axis=0) > 0):
        each["snips"] = _normalised(weights, rewards)
        if drawn is not None:
            asked, modelled = _modelled(log, drawn, users, seed)
            correction, influence = _normalised(weights, rewards - np.where(shown, modelled, 0.0))
            direct = asked.sum(axis=1)
            each["dr"] = direct.mean() + correction, direct - direct.mean() + influence
    influences = {
        name: np.bincount(log.users, weights=one, minlength=users) / len(log.users)
        for name, (_, one) in each.items()
    }
    return Evaluation(
        {name: _interval(value, influences[name]) for name, (value, _) in each.items()},
        effective_number(weights[:, -1]),
        influences,
    )


def difference(ours: Evaluation, theirs: Evaluation, estimator: str) -> Estimate:
    """Ours less theirs by one estimator, paired: both were evaluated on the same slates."""
    value = ours.estimates[estimator].value - theirs.estimates[estimator].value
    return _interval(value, ours.influences[estimator] - theirs.influences[estimator])


def naive(log: SlateLog) -> Estimate:
    """The mean of what was logged: right for the policy that served, and often taken for others."""
    rewards = np.where(np.isnan(log.logged), 0.0, log.rewards).sum(axis=1)
    users = int(log.users.max()) + 1
    influence = np.bincount(log.users, weights=rewards - rewards.mean(), minlength=users) / len(rewards)
    return _interval(float(rewards.mean()), influence)


def effective_number(weights: Floats) -> float:
    """(sum w)^2 / sum w^2 (Kish 1965); 0 where no slate is possible under the policy."""
    squares = float((weights**2).sum())
    return float(weights.sum() ** 2 / squares) if squares > 0 else 0.0


class RewardModel:
    """m(y, t) = e_t a_y, with e_t the mean reward of place t and a_y the likes of item y over what its places
    let expect, both with SHRINKAGE expected likes of an ordinary item added."""

    def __init__(self, items: Ints, rewards: Floats, catalogue: int) -> None:
        shown = items >= 0
        self.places = np.where(shown, rewards, 0.0).sum(axis=0) / np.maximum(shown.sum(axis=0), 1)
        expected = np.where(shown, self.places, 0.0)
        likes = np.bincount(items[shown], weights=rewards[shown], minlength=catalogue)
        due = np.bincount(items[shown], weights=expected[shown], minlength=catalogue)
        self.rates = (likes + SHRINKAGE) / (due + SHRINKAGE)

    def __call__(self, items: Ints) -> Floats:
        """[n, T'] items, -1: none -> expected rewards, 0 for none."""
        width = items.shape[1]
        places = np.zeros(width)
        places[: len(self.places)] = self.places[:width]
        return np.asarray(np.where(items >= 0, np.minimum(places * self.rates[items], 1.0), 0.0))


def _modelled(log: SlateLog, drawn: Ints, users: int, seed: int) -> tuple[Floats, Floats]:
    """(m of the drawn slates, m of the logged ones), each by a model of other users."""
    catalogue = int(max(log.items.max(), drawn.max())) + 1
    fold = np.random.default_rng(seed).permutation(users)[log.users] % min(FOLDS, users)
    asked, modelled = np.zeros(drawn.shape), np.zeros(log.items.shape)
    for one in range(fold.max() + 1):
        inside = fold == one
        model = RewardModel(log.items[~inside], log.rewards[~inside], catalogue)
        asked[inside], modelled[inside] = model(drawn[inside]), model(log.items[inside])
    return asked, modelled


def _normalised(weights: Floats, values: Floats) -> tuple[float, Floats]:
    """sum_t (sum_i w_t v_t / sum_i w_t), and each slate's influence on it."""
    means = (weights * values).sum(axis=0) / weights.sum(axis=0)
    influence = (weights * (values - means) / weights.mean(axis=0)).sum(axis=1)
    return float(means.sum()), influence


def _interval(value: float, influences: Floats) -> Estimate:
    users = len(influences)
    error = float(np.sqrt((influences**2).sum() * users / (users - 1)))
    reach = float(student.ppf(0.975, users - 1)) * error
    return Estimate(float(value), float(value) - reach, float(value) + reach)
