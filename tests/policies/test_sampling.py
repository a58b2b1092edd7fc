"""Sampled slates follow the law that their propensities state."""

from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from policies.codec import ScidCodec
from policies.policy import Policy, UserContext
from policies.prompt import prompt_ids
from policies.propensity import slate_propensities
from policies.settings import DecodingSettings
from tests.policies.factory import item_ids, write_tiny_policy
from tests.policies.test_decoding import exhaustive, ids_of, users

CODES = [(0, 0, 0), (0, 0, 1), (0, 2, 1), (1, 0, 0), (1, 1, 1), (2, 1, 0), (2, 1, 2)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Seven items in a crooked trie; the model softened so that every item has a chance."""
    codec = ScidCodec(item_ids(7), np.array(CODES), (3, 3, 3), quantizer_hash="q")
    directory = write_tiny_policy(tmp_path_factory.mktemp("small") / "v1", codec=codec)
    policy = Policy.load(directory, settings=DecodingSettings(batch=1000))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(0.7)
    return policy


USER = UserContext("u", ("item-002", "item-005"), frozenset({"item-006"}))


def q_of(policy: Policy, user: UserContext) -> dict[str, float]:
    """q by its definition: a softmax over live children at every node, one forward pass a prefix."""
    live = [i for i, name in enumerate(policy.codec.item_ids) if name not in user.seen]
    prompt = prompt_ids(policy.tokens, user.history)
    q = {}
    for item in live:
        q[policy.codec.item_ids[item]] = 1.0
        for level in range(3):
            prefix = CODES[item][:level]
            ids = prompt + [int(policy.tokens.levels[i][code]) for i, code in enumerate(prefix)]
            with torch.no_grad():
                logits = policy.model(torch.tensor([ids])).logits[0, -1].double().numpy()
            children = sorted({CODES[i][level] for i in live if CODES[i][:level] == prefix})
            weights = np.exp([logits[policy.tokens.levels[level][code]] for code in children])
            q[policy.codec.item_ids[item]] *= weights[children.index(CODES[item][level])] / weights.sum()
    return q


def law(q: dict[str, float], k: int) -> dict[tuple[str, ...], list[float]]:
    """Plackett-Luce: the conditional probabilities of every ordered slate."""
    slates = {}
    for slate in permutations(q, k):
        left, steps = 1.0, []
        for item in slate:
            steps.append(q[item] / left)
            left -= q[item]
        slates[slate] = steps
    return slates


def test_propensities_are_the_sequential_probabilities(small: Policy) -> None:
    q = q_of(small, USER)
    assert sum(q.values()) == pytest.approx(1.0)
    expected = law(q, 6)
    for seed in range(50):
        slate = small.sample([USER], 6, seed=seed)[0]
        names = tuple(place.item_id for place in slate)
        # fp32 logits of order 10 computed in another order.
        assert [place.propensity for place in slate] == pytest.approx(expected[names], rel=1e-4)
        assert slate[-1].propensity == pytest.approx(1.0)


@pytest.mark.parametrize("k", [1, 2])
def test_slates_come_as_often_as_their_law_says(small: Policy, k: int) -> None:
    draws = 4000
    several = [UserContext(f"u{n}", USER.history, USER.seen) for n in range(draws)]
    counts = Counter(tuple(p.item_id for p in slate) for slate in small.sample(several, k, seed=5))
    expected = {slate: float(np.prod(steps)) for slate, steps in law(q_of(small, USER), k).items()}
    assert set(counts) <= set(expected)
    rare = sum(p for p in expected.values() if p * draws < 5)
    seen_rare = sum(count for slate, count in counts.items() if expected[slate] * draws < 5)
    common = [(counts[slate], p * draws) for slate, p in expected.items() if p * draws >= 5]
    cells = [*common, *([(seen_rare, rare * draws)] if rare else [])]
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    freedom = len(cells) - 1
    # Chi-square, 5 standard deviations above its mean: a right sampler fails once in about 10^5 seeds.
    assert freedom >= 4
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_weighting_by_propensity_recovers_the_mean_reward_of_another_policy(small: Policy) -> None:
    """E[ r(y_1) target(y_1) / propensity(y_1) ] is the target's value, here the uniform policy's."""
    q = q_of(small, USER)
    reward = {item: float(number) for number, item in enumerate(q)}
    several = [UserContext(f"w{n}", USER.history, USER.seen) for n in range(6000)]
    terms = np.array(
        [
            reward[slate[0].item_id] / len(q) / float(slate[0].propensity or 0)
            for slate in small.sample(several, 3, seed=9)
        ]
    )
    error = terms.std() / np.sqrt(len(terms))
    truth = float(np.mean(list(reward.values())))
    # 4 standard errors, which must themselves be small enough to say something.
    assert error < 0.1 * truth
    assert abs(terms.mean() - truth) < 4 * error


def test_a_sample_is_a_function_of_seed_and_user_alone(tiny_policy: Policy) -> None:
    several = users(12, seen=20)
    together = tiny_policy.sample(several, 10, seed=3)
    alone = [tiny_policy.sample([user], 10, seed=3)[0] for user in several]
    assert ids_of(together) == ids_of(alone)
    assert ids_of(tiny_policy.sample(several, 10, seed=4)) != ids_of(together)
    twins = [UserContext(name, several[5].history) for name in ("a", "b")]
    left, right = ids_of(tiny_policy.sample(twins, 10, seed=3))
    assert left != right


def test_scores_of_a_sample_are_log_pi(tiny_policy: Policy) -> None:
    user = users(4)[3]
    scores = exhaustive(tiny_policy, user)
    for place in tiny_policy.sample([user], 20, seed=1)[0]:
        assert place.score == pytest.approx(scores[place.item_id], abs=1e-4)
        assert place.propensity is not None
        assert 0 < place.propensity <= 1


def test_a_low_temperature_samples_the_best_first(small: Policy) -> None:
    q = q_of(small, USER)
    slate = small.sample([USER], 6, seed=1, temperature=1e-3)[0]
    greedy = small.recommend([USER], 1, beam=1)[0][0]
    assert slate[0].item_id == greedy.item_id
    assert slate[0].propensity == pytest.approx(1.0)
    assert {place.item_id for place in slate} == set(q)
    assert all(0 < float(place.propensity or 0) <= 1 for place in slate)


def test_unknown_users_are_sampled_too_with_the_law_of_ranks(tmp_path: Path) -> None:
    codec = ScidCodec(item_ids(4), np.arange(12).reshape(4, 3) % 4, (4, 4, 4), quantizer_hash="q")
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=codec))
    weights = {name: 1 / rank for rank, name in enumerate(item_ids(4), start=1)}
    expected = law({name: weight / sum(weights.values()) for name, weight in weights.items()}, 4)
    counts: Counter[str] = Counter()
    strangers = [UserContext(str(n)) for n in range(3000)]
    for slate in policy.sample(strangers, 4, seed=2):
        names = tuple(place.item_id for place in slate)
        assert [place.propensity for place in slate] == pytest.approx(expected[names])
        counts[names[0]] += 1
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        # 5 standard deviations of a binomial.
        assert abs(counts[name] - 3000 * share) < 5 * np.sqrt(3000 * share * (1 - share))


def test_the_propensities_of_a_served_slate_are_found_again(small: Policy) -> None:
    several = [UserContext(f"u{n}", ("item-002", "item-005")[: n % 2 + 1], USER.seen) for n in range(12)]
    served = small.sample(several, 4, seed=3, temperature=1.3)
    slates = [[one.item_id for one in slate] for slate in served]
    slates[0] = slates[0][:2]
    found = slate_propensities(small, several, slates, temperature=1.3)
    assert found.shape == (12, 4)
    assert np.isnan(found[0, 2:]).all()
    for row, slate in enumerate(served):
        logged = [one.propensity for one in slate][: len(slates[row])]
        assert found[row, : len(logged)] == pytest.approx(logged, rel=1e-4)


def test_another_policys_propensities_follow_its_law(small: Policy) -> None:
    found = slate_propensities(
        small, [USER] * 3, [["item-003", "item-000"], ["item-006", "item-000"], ["none"]]
    )
    assert found[0] == pytest.approx(law(q_of(small, USER), 2)["item-003", "item-000"], rel=1e-4)
    assert found[1].tolist() == [0.0, 0.0]  # seen: this user cannot get it, and nothing can follow it
    assert found[2, 0] == 0.0
    unknown = slate_propensities(small, [UserContext("nobody")], [["item-003"]])
    assert np.isnan(unknown).all()
