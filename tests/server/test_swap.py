"""Following the ledger: swaps at once, and whatever is broken leaves the last good policy serving."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from align3gr.server.metrics import ServerMetrics
from align3gr.server.runtime import policy_swap
from align3gr.server.swap import RETRY_SECONDS, PolicySwap
from align3gr.settings import Settings
from policies.ledger import PromotionLedger


@dataclass
class Disk:
    """Versions that can be loaded, and a record of what was."""

    good: set[str]
    loaded: list[str] = field(default_factory=list)

    def load(self, version: str) -> str:
        self.loaded.append(version)
        if version not in self.good:
            raise OSError(f"{version} is damaged")
        return f"weights of {version}"


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


Made = tuple[PolicySwap[str], PromotionLedger, Disk, Clock, ServerMetrics]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Made]:
    def make(good: set[str], *, candidates: tuple[str, ...] = (), warm: int = 2) -> Made:
        ledger, disk, clock, metrics = PromotionLedger(tmp_path), Disk(good), Clock(), ServerMetrics()
        swap = PolicySwap(
            ledger.reference, disk.load, metrics, candidates=lambda: candidates, warm=warm, clock=clock
        )
        return swap, ledger, disk, clock, metrics

    return make


def settle(swap: PolicySwap[str]) -> None:
    """What the two threads do, in one."""
    swap.look()
    while swap.load_next():
        pass


def serving(swap: PolicySwap[str]) -> tuple[str, str]:
    assert swap.current is not None
    return swap.current.version, swap.current.policy


def test_promotion_and_rollback_are_followed(made: Callable[..., Made]) -> None:
    swap, ledger, disk, _, metrics = made({"v1", "v2"})
    settle(swap)
    assert swap.current is None
    ledger.promote("v1", expects=None, who="t", why="t")
    settle(swap)
    assert serving(swap) == ("v1", "weights of v1")
    ledger.promote("v2", expects="v1", who="t", why="t")
    settle(swap)
    assert serving(swap) == ("v2", "weights of v2")
    ledger.rollback(who="t", why="t")
    swap.look()  # kept warm: swapped at the first look, without a load
    assert serving(swap) == ("v1", "weights of v1")
    assert disk.loaded == ["v1", "v2"]
    assert b"align3gr_policy_swaps_total 2.0" in metrics.text()


def test_a_registered_candidate_is_warm_before_it_is_promoted(made: Callable[..., Made]) -> None:
    swap, ledger, disk, _, _ = made({"v1", "v2"}, candidates=("v1", "v2"))
    ledger.promote("v1", expects=None, who="t", why="t")
    settle(swap)
    assert disk.loaded == ["v1", "v2"]
    ledger.promote("v2", expects="v1", who="t", why="t")
    swap.look()
    assert serving(swap)[0] == "v2"
    assert disk.loaded == ["v1", "v2"]


def test_a_broken_reference_is_said_and_the_last_good_one_serves_on(made: Callable[..., Made]) -> None:
    swap, ledger, disk, clock, metrics = made({"v1"})
    ledger.promote("v1", expects=None, who="t", why="t")
    settle(swap)
    ledger.promote("v2", expects="v1", who="t", why="t")
    settle(swap)
    assert serving(swap)[0] == "v1"
    state = swap.state()
    assert (state.serving, state.reference, state.error) == ("v1", "v2", "v2 is damaged")
    assert b"align3gr_policy_behind 1.0" in metrics.text()
    assert b"align3gr_policy_swap_failures_total 1.0" in metrics.text()

    settle(swap)
    assert disk.loaded == ["v1", "v2"]  # not tried in a hot loop
    disk.good.add("v2")
    clock.now += RETRY_SECONDS
    settle(swap)
    assert serving(swap)[0] == "v2"
    assert swap.state().error is None
    assert b"align3gr_policy_behind 0.0" in metrics.text()


def test_a_broken_candidate_disturbs_nothing(made: Callable[..., Made]) -> None:
    swap, ledger, disk, _, metrics = made({"v1"}, candidates=("v1", "v2"))
    ledger.promote("v1", expects=None, who="t", why="t")
    settle(swap)
    settle(swap)
    assert serving(swap)[0] == "v1"
    assert disk.loaded == ["v1", "v2"]
    assert swap.state().error is None
    assert b"align3gr_policy_swap_failures_total 0.0" in metrics.text()


def test_policies_that_nobody_needs_are_let_go(made: Callable[..., Made]) -> None:
    versions = [f"v{number}" for number in range(1, 6)]
    swap, ledger, _, _, _ = made(set(versions), warm=1)
    before = None
    for version in versions:
        ledger.promote(version, expects=before, who="t", why="t")
        settle(swap)
        before = version
    assert set(swap._loaded) == {"v4", "v5"}


def test_a_ledger_that_cannot_be_read_leaves_the_policy_serving(made: Callable[..., Made]) -> None:
    swap, ledger, _, _, _ = made({"v1"})
    ledger.promote("v1", expects=None, who="t", why="t")
    settle(swap)
    swap._reference = lambda: (_ for _ in ()).throw(OSError("disk gone"))
    swap.look()
    assert serving(swap)[0] == "v1"
    assert swap.state().error == "the promotion ledger cannot be read: disk gone"


def test_real_policies_swap_and_a_corrupt_one_is_refused(served_home: Path, tmp_path: Path) -> None:
    shutil.copytree(served_home / "policies", tmp_path / "policies")
    weights = tmp_path / "policies" / "v3" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    ledger = PromotionLedger(tmp_path / "ledger")
    ledger.promote("v1", expects=None, who="t", why="t")
    swap = policy_swap(Settings(home=tmp_path), ServerMetrics())
    swap.look()
    while swap.load_next():
        pass
    ledger.promote("v3", expects="v1", who="t", why="t")
    swap.look()
    while swap.load_next():
        pass
    state = swap.state()
    assert (state.serving, state.reference) == ("v1", "v3")
    assert state.error is not None
    assert "model.safetensors is not the file it was written with" in state.error
    ledger.rollback(who="t", why="t")
    ledger.promote("v2", expects="v1", who="t", why="t")
    swap.look()
    while swap.load_next():
        pass
    assert swap.state().serving == "v2"
