"""The gate's statistical behaviour on planted arrays, fixed seeds."""

import numpy as np
import pytest

from policies.errors import PoliciesError
from policies.gate import Decision, GateInput, PolicyFigures, decide, lower_bound
from policies.settings import GateSettings

SETTINGS = GateSettings(min_users=100, resamples=500)


def figures(
    version: str,
    slate: np.ndarray | None = None,
    full: np.ndarray | None = None,
    *,
    coverage: float = 0.5,
    validity: float = 1.0,
    concentration: float | None = 0.1,
) -> PolicyFigures:
    arrays = {name: values for name, values in (("slate", slate), ("full", full)) if values is not None}
    return PolicyFigures(version, arrays, coverage, validity, concentration)


def population(seed: int, users: int = 600) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
    """Win rates around 0.6 and NDCGs that are mostly zero, as real ones are."""
    random = np.random.default_rng(seed)
    slate = random.beta(3, 2, users)
    full = np.where(random.random(users) < 0.3, random.random(users), 0.0)
    return random, slate, full


def judge(
    candidate: PolicyFigures, reference: PolicyFigures, anchor: PolicyFigures | None = None
) -> Decision:
    users = tuple(f"u{n}" for n in range(len(next(iter(candidate.per_user.values())))))
    return decide(GateInput(users, candidate, reference, anchor), SETTINGS, seed=7)


def test_the_reference_against_itself_is_never_promoted() -> None:
    for seed in range(20):
        _, slate, full = population(seed)
        same = figures("v2", slate, full)
        decision = judge(same, figures("v1", slate, full), figures("v0", slate, full))
        assert decision.outcome == "hold"
        assert "no better" in decision.why


def test_noise_around_the_reference_is_rarely_promoted() -> None:
    promoted = 0
    for seed in range(100):
        random, slate, full = population(seed)
        noisy = figures("v2", slate + random.normal(0, 0.1, len(slate)), full)
        promoted += judge(noisy, figures("v1", slate, full)).outcome == "promote"
    # 5% one-sided, halved by Bonferroni over two metrics: 2.5 expected; 8 has probability < 0.5%.
    assert promoted <= 7


@pytest.mark.parametrize("gain", [0.03, 0.06])
def test_a_truly_better_candidate_is_promoted_with_enough_users(gain: float) -> None:
    promoted = 0
    for seed in range(20):
        random, slate, full = population(seed, users=1200)
        better = figures("v2", slate + gain + random.normal(0, 0.1, len(slate)), full)
        promoted += judge(better, figures("v1", slate, full), figures("v0", slate, full)).outcome == "promote"
    assert promoted >= 19


def test_planted_bad_candidates_are_refused_and_the_metric_is_named() -> None:
    refused = 0
    for seed in range(20):
        _, slate, full = population(seed)
        inverted = figures("v2", 1.0 - slate, full)
        decision = judge(inverted, figures("v1", slate, full), figures("v0", slate, full))
        refused += decision.outcome == "refuse" and "within the slate" in decision.why
    assert refused == 20


def test_a_loss_on_the_full_catalogue_is_refused_though_slates_improve() -> None:
    _, slate, full = population(1)
    decision = judge(figures("v2", slate + 0.1, full * 0.3), figures("v1", slate, full))
    assert decision.outcome == "refuse"
    assert "full catalogue" in decision.why
    assert {check.metric for check in decision.failed} == {"full"}


def test_small_losses_that_add_up_are_stopped_by_the_anchor() -> None:
    # Each candidate gains a little over a reference that itself sank: only the anchor remembers.
    random, slate, full = population(3, users=1500)
    sunk = slate - 0.08
    candidate = figures("v9", sunk + 0.02 + random.normal(0, 0.02, len(slate)), full)
    without = judge(candidate, figures("v8", sunk, full))
    with_anchor = judge(candidate, figures("v8", sunk, full), figures("v1", slate, full))
    assert without.outcome == "promote"
    assert with_anchor.outcome == "refuse"
    assert "anchor v1" in with_anchor.why


@pytest.mark.parametrize(
    ("spoilt", "word"),
    [
        ({"coverage": 0.1}, "coverage"),
        ({"validity": 0.99}, "validity"),
        ({"concentration": 0.9}, "popularity concentration"),
    ],
)
def test_collapse_is_refused_by_its_name(spoilt: dict[str, float], word: str) -> None:
    _, slate, full = population(4)
    decision = judge(figures("v2", slate + 0.1, full, **spoilt), figures("v1", slate, full))
    assert decision.outcome == "refuse"
    assert decision.why.startswith(word)


def test_too_few_users_hold_whatever_the_figures_say() -> None:
    _, slate, full = population(5, users=99)
    for shift in (0.3, -0.3):
        decision = judge(figures("v2", slate + shift, full), figures("v1", slate, full))
        assert decision.outcome == "hold"
        assert "too few gate users" in decision.why


def test_users_without_a_case_do_not_count() -> None:
    _, slate, _ = population(6)
    slate[90:] = np.nan
    decision = judge(figures("v2", slate + 0.3), figures("v1", slate))
    assert decision.outcome == "hold"
    assert decision.users == 90


def test_a_required_metric_that_cannot_be_judged_holds() -> None:
    _, slate, _ = population(8)
    users = tuple(f"u{n}" for n in range(len(slate)))
    given = GateInput(users, figures("v2", slate + 0.1), figures("v1", slate))
    assert decide(given, SETTINGS, seed=1).outcome == "promote"
    strict = SETTINGS.model_copy(update={"required": ("full",)})
    assert decide(given, strict, seed=1).outcome == "hold"


def test_the_same_input_and_seed_give_the_same_decision() -> None:
    random, slate, full = population(9)
    better = figures("v2", slate + random.normal(0.02, 0.2, len(slate)), full)
    assert judge(better, figures("v1", slate, full)) == judge(better, figures("v1", slate, full))


def test_arrays_of_other_users_are_an_error() -> None:
    _, slate, full = population(10)
    with pytest.raises(PoliciesError, match="same users"):
        judge(figures("v2", slate, full), figures("v1", slate[:-1], full))


def test_the_lower_bound_covers_the_true_mean_as_often_as_it_says() -> None:
    covered = 0
    random = np.random.default_rng(11)
    for _ in range(200):
        sample = random.normal(0.1, 1.0, 200)
        covered += lower_bound(sample, confidence=0.95, resamples=400, random=random) <= 0.1
    # Binomial(200, 0.95): 180 or fewer has probability 0.5%.
    assert covered >= 181


def test_identical_differences_need_no_resampling() -> None:
    zeros = np.zeros(150)
    assert lower_bound(zeros, confidence=0.95, resamples=100, random=np.random.default_rng(0)) == 0.0
