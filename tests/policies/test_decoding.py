"""Beam search over the trie: exact where it covers, valid, unique, complete, and the same as `generate`."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policies.codec import ScidCodec
from policies.errors import BadRequest, PoliciesError
from policies.policy import Eligible, Policy, Recommendation, UserContext
from policies.prompt import answer_ids, prompt_ids
from policies.scoring import answer_log_probs, pack
from policies.settings import DecodingSettings
from tests.policies.factory import item_ids, tiny_codec, write_tiny_policy

# fp32 on log-probabilities of order 10, summed in another order.
TOLERANCE = 1e-4


def users(count: int, items: int = 200, seen: int = 0) -> list[UserContext]:
    """Histories of 1 to 25 items: prompts of many lengths."""
    draw = np.random.default_rng(7)
    found = []
    for number in range(count):
        names = [f"item-{i:03d}" for i in draw.choice(items, size=min(items, 1 + number % 25), replace=False)]
        left_out = [f"item-{i:03d}" for i in draw.choice(items, size=seen, replace=False)]
        found.append(UserContext(f"user-{number}", tuple(names), frozenset(left_out)))
    return found


def ids_of(lists: list[list[Recommendation]]) -> list[list[str]]:
    return [[place.item_id for place in one] for one in lists]


def exhaustive(policy: Policy, user: UserContext) -> dict[str, float]:
    """log pi of every item, by the scoring engine."""
    answers = [answer_ids(policy.tokens, item_id) for item_id in policy.codec.item_ids]
    packed = pack([prompt_ids(policy.tokens, user.history)], [answers], policy.tokens.pad)
    with torch.no_grad():
        scores = answer_log_probs(policy.model, packed.to(policy.device))[0].tolist()
    return dict(zip(policy.codec.item_ids, scores, strict=True))


def generated(policy: Policy, user: UserContext, beam: int) -> list[str]:
    """The same search by transformers' own `generate`."""
    prompt = prompt_ids(policy.tokens, user.history)
    tokens = policy.tokens.levels
    codes = [{int(token): code for code, token in enumerate(level)} for level in tokens]

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        prefix = [codes[level][int(token)] for level, token in enumerate(ids[len(prompt) :])]
        return [int(tokens[len(prefix)][code]) for code in policy.trie.allowed(prefix)]

    found = policy.model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=beam,
        num_return_sequences=beam,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=None,
        pad_token_id=policy.tokens.pad,
    )
    answers = found[:, len(prompt) :].tolist()
    return [policy.codec.decode([codes[level][t] for level, t in enumerate(answer)]) for answer in answers]


@pytest.fixture(scope="module")
def styles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    folder = tmp_path_factory.mktemp("styles")
    names = ("llama", "qwen", "gemma")
    return {name: Policy.load(write_tiny_policy(folder / name, style=name)) for name in names}


@pytest.mark.parametrize("style", ["llama", "qwen", "gemma"])
def test_a_beam_that_covers_the_catalogue_is_the_exhaustive_ranking(
    styles: dict[str, Policy], style: str
) -> None:
    policy = styles[style]
    several = users(6)
    lists = policy.recommend(several, 200, beam=200)
    for user, one in zip(several, lists, strict=True):
        scores = exhaustive(policy, user)
        assert sorted(place.item_id for place in one) == sorted(scores)
        assert [p.position for p in one] == list(range(1, 201))
        for place in one:
            assert place.score == pytest.approx(scores[place.item_id], abs=TOLERANCE)
        best = sorted(scores.values(), reverse=True)
        assert [place.score for place in one] == pytest.approx(best, abs=TOLERANCE)


def test_lists_are_those_of_generate_with_the_same_beam(tiny_policy: Policy) -> None:
    several = users(8)
    ours = ids_of(tiny_policy.recommend(several, 20, beam=20))
    assert ours == [generated(tiny_policy, user, 20) for user in several]


def test_lists_do_not_depend_on_who_else_is_in_the_call(tiny_policies: Path) -> None:
    several = users(40, seen=30)
    whole = Policy.load(tiny_policies / "v1", settings=DecodingSettings(batch=64)).recommend(several, 10)
    small = Policy.load(tiny_policies / "v1", settings=DecodingSettings(batch=3))
    assert ids_of(small.recommend(several, 10)) == ids_of(whole)
    assert ids_of([small.recommend([user], 10)[0] for user in several]) == ids_of(whole)
    assert ids_of(small.recommend(several[::-1], 10)) == ids_of(whole)[::-1]


def test_seen_items_are_left_out_and_the_rest_keeps_its_order(tiny_policy: Policy) -> None:
    user = users(10)[9]
    everything = ids_of(tiny_policy.recommend([user], 200, beam=200))[0]
    seen = frozenset(everything[:60:2])
    without = ids_of(tiny_policy.recommend([UserContext(user.user_id, user.history, seen)], 170, beam=200))[0]
    assert without == [item for item in everything if item not in seen]
    kept = tiny_policy.recommend(
        [UserContext(user.user_id, user.history, seen)], 200, beam=200, exclude_seen=False
    )
    assert ids_of(kept)[0] == everything


def test_a_user_whose_beams_all_end_on_seen_items_still_gets_k(tiny_policy: Policy) -> None:
    user = users(3)[2]
    everything = ids_of(tiny_policy.recommend([user], 200, beam=200))[0]
    seen = frozenset(everything[:190])
    one = tiny_policy.recommend([UserContext(user.user_id, user.history, seen)], 10, beam=1)[0]
    assert [place.item_id for place in one] == everything[190:]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_list_is_valid_unique_eligible_unseen_and_as_long_as_it_can_be(
    tiny_policy: Policy, data: st.DataObject
) -> None:
    names = item_ids(200)
    eligible = data.draw(st.none() | st.sets(st.sampled_from([*names, "unknown"]), max_size=60))
    seen = data.draw(st.sets(st.sampled_from([*names, "gone"]), max_size=200))
    history = data.draw(st.lists(st.sampled_from([*names, "gone"]), max_size=30))
    k, beam = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 30))
    user = UserContext("u", tuple(history), frozenset(seen))
    left = {name for name in names if name not in seen and (eligible is None or name in eligible)}
    for one in (
        tiny_policy.recommend([user], k, beam=beam, eligible=eligible)[0],
        tiny_policy.sample([user], k, seed=data.draw(st.integers(0, 99)), eligible=eligible)[0],
    ):
        found = [place.item_id for place in one]
        assert len(found) == min(k, len(left))
        assert len(set(found)) == len(found)
        assert set(found) <= left
        unknown = not set(history) & set(names)
        assert {place.source for place in one} <= {"popularity" if unknown else "policy"}
        assert [place.position for place in one] == list(range(1, len(found) + 1))


@pytest.mark.parametrize(
    ("items", "sizes"),
    [
        (1, (1, 1, 1)),
        (3, (2, 2, 2)),
        (3, (256, 256, 256)),
        (40, (64,)),
        (90, (5, 2, 3, 4)),
        (200, (2, 2, 64)),
    ],
)
def test_catalogues_of_any_shape(tmp_path: Path, items: int, sizes: tuple[int, ...]) -> None:
    codec = tiny_codec(items, sizes)
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=codec))
    user = UserContext("u", (codec.item_ids[0],))
    one = policy.recommend([user], items + 5, beam=2)[0]
    scores = exhaustive(policy, user)
    assert sorted(place.item_id for place in one) == sorted(scores)
    assert [p.score for p in one] == pytest.approx(sorted(scores.values(), reverse=True), abs=TOLERANCE)
    assert len(policy.sample([user], items + 5, seed=1)[0]) == items


def test_equal_scores_keep_the_order_of_the_codec(tmp_path: Path) -> None:
    codes = np.stack(np.unravel_index(np.arange(30), (2, 3, 5)), axis=1)
    codec = ScidCodec(item_ids(30), codes, (2, 3, 5), quantizer_hash="q")
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=codec))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    several = [UserContext(str(n), tuple(item_ids(30)[: n + 1])) for n in range(5)]
    assert ids_of(policy.recommend(several, 7)) == [item_ids(7)] * 5


def test_unknown_users_get_the_most_popular_items_that_are_left(tmp_path: Path) -> None:
    popular = ["item-007", "item-003", "gone", "item-003", "item-001"]
    policy = Policy.load(write_tiny_policy(tmp_path / "v1", codec=tiny_codec(10), popularity=popular))
    someone = UserContext("u", ("gone",), frozenset({"item-003", "gone"}))
    eligible = {"item-003", "item-007", "item-001", "item-000", "item-009"}
    one = policy.recommend([someone], 9, eligible=eligible)[0]
    assert [place.item_id for place in one] == ["item-007", "item-001", "item-000", "item-009"]
    assert {place.source for place in one} == {"popularity"}
    mixed = policy.recommend([someone, UserContext("v", ("item-002",)), someone], 2)
    assert [one[0].source for one in mixed] == ["popularity", "policy", "popularity"]


def test_nobody_gets_no_list_and_nonsense_is_refused(tiny_policy: Policy) -> None:
    assert tiny_policy.recommend([], 5) == []
    assert tiny_policy.recommend([UserContext("u", ("item-001",))], 5, eligible=[]) == [[]]
    for bad in ({"k": 0}, {"k": 5, "beam": 0}):
        with pytest.raises(BadRequest, match="positive"):
            tiny_policy.recommend([UserContext("u")], **bad)
    with pytest.raises(BadRequest, match="temperature"):
        tiny_policy.sample([UserContext("u")], 3, seed=1, temperature=0.0)


def test_a_set_of_eligible_items_can_be_worked_out_once(tiny_policy: Policy) -> None:
    several, names = users(5), item_ids(200)[50:90]
    once: Any = tiny_policy.eligible(names)
    assert ids_of(tiny_policy.recommend(several, 9, eligible=once)) == ids_of(
        tiny_policy.recommend(several, 9, eligible=names)
    )
    other = Eligible(once.mask[:-1], once.alive[:-1])
    with pytest.raises(BadRequest, match="another policy"):
        tiny_policy.recommend(several, 9, eligible=other)


def test_a_model_that_computes_nan_is_an_error_and_no_short_list(tmp_path: Path) -> None:
    policy = Policy.load(write_tiny_policy(tmp_path / "v1"))
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PoliciesError, match="NaN"):
        policy.recommend(users(3), 5)
    with pytest.raises(PoliciesError, match="NaN"):
        policy.sample(users(3), 5, seed=1)


def test_a_policy_that_is_being_trained_makes_no_lists(tiny_policies: Path) -> None:
    policy = Policy.load(tiny_policies / "v2", trainable=True)
    with pytest.raises(PoliciesError, match="training mode"):
        policy.recommend(users(1), 5)
    policy.model.eval()
    assert len(policy.recommend(users(1), 5)[0]) == 5


def test_threads_may_share_a_policy(tiny_policy: Policy) -> None:
    several = users(24, seen=10)
    expected = ids_of(tiny_policy.recommend(several, 10))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda user: tiny_policy.recommend([user], 10)[0], several)
        assert ids_of(list(found)) == expected
