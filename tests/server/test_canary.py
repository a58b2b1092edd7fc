"""A canary beside the reference: who meets it, and that nobody goes without an answer, however it behaves."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align3gr.server.canary import CanaryWatch
from align3gr.server.eligible import EligibleItems
from align3gr.server.metrics import ServerMetrics
from align3gr.server.runtime import policy_swap
from align3gr.server.service import Recommender, Slate
from align3gr.server.swap import PolicySwap
from align3gr.settings import Settings
from features.online.contexts import OnlineFeatures
from policies.ledger import Canary, PromotionLedger
from policies.settings import CanarySettings
from policies.shares import takes_part
from tests.server.conftest import USERS
from tests.server.test_swap import Clock, Disk, settle

DEFAULT: dict[str, Any] = {}
PATIENT = {"deadline_s": 30.0}
"""On a machine that is busy with other work an answer may be late, and then it is the reference's."""
STRICT = {"deadline_s": 0.5, "latency_factor": None}
BESIDE_THE_REFERENCE = {"deadline_s": 30.0, "latency_answers": 6, "latency_slow": 5}
ROLLED_BACK_WITHIN_S = 10.0


@pytest.fixture
def ledger(served_home: Path, tmp_path: Path) -> PromotionLedger:
    """A home of its own: v1 is the reference, v2 the canary with half of the users."""
    (tmp_path / "policies").symlink_to(served_home / "policies")
    ledger = PromotionLedger(tmp_path / "ledger")
    ledger.promote("v1", expects=None, who="test", why="first")
    ledger.start_canary("v2", 0.5, expects="v1", who="test", why="try")
    return ledger


@contextmanager
def recommender(home: Path, features: OnlineFeatures, canary: dict[str, Any]) -> Iterator[Recommender]:
    settings = Settings.model_validate(
        {
            "home": home,
            "policies": {"promotion": {"canary": canary}},
            "server": {"sample_share": 0, "warm_policies": 0},
        }
    )
    metrics = ServerMetrics()
    swap = policy_swap(settings, metrics)
    eligible = EligibleItems(lambda: None, every_seconds=60)
    swap.start()
    try:
        assert until(lambda: swap.trial is not None)
        yield Recommender(
            swap,
            features,
            eligible,
            None,
            metrics,
            settings.server,
            canary=settings.policies.promotion.canary,
        )
    finally:
        swap.stop()


async def asked(service: Recommender, times: int = 1, width: int = 8) -> list[Slate]:
    """Slates for every user ``times`` times, ``width`` requests at once. One that fails raises."""
    service.start()
    turns = asyncio.Semaphore(width)

    async def one(user_id: str) -> Slate:
        async with turns:
            return await service.recommend(user_id, 5)

    try:
        return await asyncio.gather(*(one(user_id) for _ in range(times) for user_id in USERS))
    finally:
        await service.stop()


def until(condition: Callable[[], bool], seconds: float = ROLLED_BACK_WITHIN_S) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def behave(service: Recommender, recommend: Callable[..., Any]) -> None:
    """Break the loaded canary: ``recommend`` is called in place of its own, which it gets."""
    trial = service.swap.trial
    assert trial is not None
    answer = trial.policy.recommend

    def broken(*args: Any, **kwargs: Any) -> Any:
        return recommend(lambda: answer(*args, **kwargs))

    trial.policy.recommend = broken  # type: ignore[method-assign]


def test_users_meet_the_policy_that_their_hash_says_and_every_slate_names_it(
    ledger: PromotionLedger, online_features: OnlineFeatures
) -> None:
    with recommender(ledger.directory.parent, online_features, PATIENT) as service:
        slates = asyncio.run(asked(service, times=2))
        canary = ledger.canary()
        assert canary is not None
        for slate in slates:
            assert slate.policy_version == ("v2" if takes_part(slate.user_id, canary) else "v1")
            assert len(slate.items) == 5
        assert {slate.policy_version for slate in slates} == {"v1", "v2"}
        state = service.swap.state()
        assert (state.serving, state.canary, state.canary_share) == ("v1", "v2", 0.5)
        assert b"align3gr_canary_share 0.5" in service.metrics.text()


def test_a_healthy_canary_is_left_alone_by_the_default_settings(
    ledger: PromotionLedger, online_features: OnlineFeatures
) -> None:
    with recommender(ledger.directory.parent, online_features, DEFAULT) as service:
        slates = asyncio.run(asked(service, times=3))
        assert {len(slate.items) for slate in slates} == {5}
        assert service.swap.trial is not None
        assert [entry.action for entry in ledger.history()] == ["promote", "canary"]


def fails(answer: Callable[[], Any]) -> Any:
    raise RuntimeError("weights of nan")


def hangs(answer: Callable[[], Any]) -> Any:
    time.sleep(1.0)
    return answer()


def dawdles(answer: Callable[[], Any]) -> Any:
    time.sleep(1.5)  # far above what the reference takes on a busy machine
    return answer()


@pytest.mark.parametrize(
    ("how", "canary", "why"),
    [
        (fails, STRICT, "weights of nan"),
        (hangs, STRICT, "no answer within 0.5 s"),
        (dawdles, BESIDE_THE_REFERENCE, "5 of its last 5 answers were slow"),
    ],
)
def test_a_canary_that_fails_or_is_slow_is_rolled_back_and_nobody_goes_without_an_answer(
    ledger: PromotionLedger,
    online_features: OnlineFeatures,
    how: Callable[..., Any],
    canary: dict[str, Any],
    why: str,
) -> None:
    with recommender(ledger.directory.parent, online_features, canary) as service:
        behave(service, how)
        began = time.monotonic()
        slates = asyncio.run(asked(service, times=3, width=4))
        assert until(lambda: ledger.canary() is None)
        assert time.monotonic() - began < ROLLED_BACK_WITHIN_S
        assert len(slates) == 3 * len(USERS)
        assert all(len(slate.items) == 5 for slate in slates)
        last = ledger.history()[-1]
        assert (last.action, last.target, ledger.reference()) == ("withdraw", "v2", "v1")
        assert last.who.startswith("server ")
        assert why in last.why
        assert ledger.held()
        assert service.swap.trial is None


CANARY = Canary("v2", 0.05, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC), 2)


class Watched:
    """A watch with the default settings, a clock that the test sets, and what it refused."""

    def __init__(self, **settings: Any) -> None:
        self.now, self.refused = 100.0, list[str]()
        self.watch = CanaryWatch(
            CanarySettings(**settings),
            lambda canary, why: self.refused.append(why),
            ServerMetrics(),
            clock=lambda: self.now,
        )

    def reference(self, seconds: float, *, pause: float = 0.0) -> None:
        self.now += pause
        self.watch.reference_answered(seconds)

    def canary(self, seconds: float) -> None:
        self.watch.answered(CANARY, seconds)

    def late(self, seconds: float = 1.1) -> None:
        self.watch.failed(CANARY, "late", seconds, "no answer within 1 s")


def test_a_canary_is_compared_with_what_the_reference_took_at_the_same_time() -> None:
    watched = Watched()
    for busy in (1, 1, 20, 1, 20) * 20:  # a machine that is busy now and then, and then both are slow
        for _ in range(5):
            watched.reference(0.05 * busy, pause=0.1 * busy)
        watched.canary(0.06 * busy)
    assert watched.refused == []


def test_eight_slow_answers_of_ten_are_too_many_and_seven_are_not() -> None:
    watched = Watched()
    for number in range(100):
        watched.reference(0.05, pause=0.2)
        watched.canary(0.04 if number % 10 in (0, 3, 6) else 0.2)
    assert watched.refused == []
    watched.canary(0.2)
    assert watched.refused == [
        "8 of its last 10 answers were slow: 200 ms, the reference 50 ms at the same time (medians)"
    ]


def test_an_answer_that_is_fast_enough_for_anybody_is_not_slow() -> None:
    watched = Watched()
    for _ in range(40):
        watched.reference(0.01, pause=0.2)
        watched.canary(0.09)
    assert watched.refused == []


def test_late_answers_say_nothing_while_the_reference_is_as_slow() -> None:
    watched = Watched()
    for _ in range(10):
        watched.reference(1.5, pause=2.0)
        watched.late()
    assert watched.refused == []
    for _ in range(4):
        watched.reference(0.05, pause=10.0)
        watched.late()
    assert watched.refused == [
        "0 of its last 4 answers failed, 4 of the last 4 were late: no answer within 1 s"
    ]


def test_late_answers_that_are_few_and_far_between_do_no_harm() -> None:
    watched = Watched()
    for _ in range(20):
        for _ in range(3):
            watched.reference(0.05, pause=10.0)
            watched.late()
        for _ in range(7):
            watched.reference(0.05, pause=1.0)
            watched.canary(0.05)
    assert watched.refused == []


def test_failures_add_up_over_many_answers() -> None:
    watched = Watched()
    for _ in range(3):
        assert watched.refused == []
        watched.watch.failed(CANARY, "failed", 0.1, "weights of nan")
        for _ in range(60):
            watched.reference(0.05, pause=1.0)
            watched.canary(0.05)
    assert watched.refused == ["3 of its last 123 answers failed, 0 of the last 10 were late: weights of nan"]


def test_a_second_canary_begins_with_a_clean_sheet() -> None:
    watched = Watched()
    watched.late()
    watched.late()
    for _ in range(2):
        watched.watch.failed(replace(CANARY, seq=7), "failed", 0.1, "weights of nan")
    assert watched.refused == []


@pytest.mark.parametrize(
    "settings",
    [{"latency_slow": 11}, {"late": 11}, {"failures": 201}, {"latency_answers": 0}, {"deadline_s": 0}],
)
def test_bounds_that_nothing_can_reach_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CanarySettings(**settings)


def test_a_promoted_canary_serves_everybody_without_a_load(tmp_path: Path) -> None:
    swap, ledger, disk = followed(tmp_path, {"v1", "v2"})
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="t")
    settle(swap)
    assert swap.trial is not None
    assert (swap.trial.version, swap.trial.policy) == ("v2", "weights of v2")
    ledger.promote("v2", expects="v1", who="t", why="t")
    swap.look()
    assert swap.trial is None
    assert swap.current is not None
    assert swap.current.version == "v2"
    assert disk.loaded == ["v1", "v2"]


def test_a_larger_share_is_followed_at_the_next_look(tmp_path: Path) -> None:
    swap, ledger, _ = followed(tmp_path, {"v1", "v2"})
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="t")
    settle(swap)
    canary = ledger.canary()
    assert canary is not None
    ledger.grow_canary(canary, 0.25, who="t", why="t")
    swap.look()
    assert swap.state().canary_share == 0.25


def test_a_server_that_was_killed_serves_the_canary_of_the_ledger_again(tmp_path: Path) -> None:
    swap, ledger, _ = followed(tmp_path, {"v1", "v2"})
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="t")
    settle(swap)
    another = PolicySwap(
        ledger.reference, Disk({"v1", "v2"}).load, ServerMetrics(), canary=ledger.canary, clock=Clock()
    )
    settle(another)
    assert another.state() == swap.state()
    assert another.state().canary_share == 0.1


def test_a_canary_that_cannot_be_loaded_is_withdrawn_and_may_be_tried_anew(tmp_path: Path) -> None:
    swap, ledger, disk = followed(tmp_path, {"v1"})
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="t")
    settle(swap)
    settle(swap)
    assert (swap.trial, ledger.canary()) == (None, None)
    assert ledger.history()[-1].why == "it cannot be loaded: v2 is damaged"
    disk.good.add("v2")
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="mended")
    settle(swap)
    assert swap.state().canary == "v2"


def test_a_refusal_that_the_ledger_did_not_take_is_told_again(tmp_path: Path) -> None:
    swap, ledger, _ = followed(tmp_path, {"v1", "v2"})
    ledger.start_canary("v2", 0.1, expects="v1", who="t", why="t")
    settle(swap)
    canary, real = ledger.canary(), swap._withdraw
    assert canary is not None

    def full_disk(version: str, why: str) -> None:
        raise OSError("no space")

    swap._withdraw = full_disk
    swap.refuse(canary, "errors")
    settle(swap)
    assert (swap.trial, ledger.canary()) == (None, canary)
    swap._withdraw = real
    swap.look()
    assert ledger.canary() is None


def followed(folder: Path, good: set[str]) -> Any:
    ledger, disk = PromotionLedger(folder), Disk(good)
    ledger.promote("v1", expects=None, who="t", why="t")
    swap: PolicySwap[str] = PolicySwap(
        ledger.reference,
        disk.load,
        ServerMetrics(),
        warm=0,
        canary=ledger.canary,
        withdraw=lambda version, why: ledger.withdraw(version, who="server", why=why),
        clock=Clock(),
    )
    settle(swap)
    return swap, ledger, disk
