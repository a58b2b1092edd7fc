"""A canary in a real server while clients ask as fast as they are answered, with the default settings."""

from pathlib import Path

import pytest

from benchmarks.canary import build_home, serving, trial
from policies.ledger import PromotionLedger

ROLLED_BACK_WITHIN_S = 10.0
SHARE = 0.25
"""Of users: enough of the canary's answers in a few seconds, also where the machine does other work."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("canary")
    build_home(home, items=300, width=32, layers=1)
    return home


def test_a_healthy_canary_is_left_alone(home: Path) -> None:
    with serving(home, "healthy") as server:
        found = trial(PromotionLedger(home / "ledger"), server, SHARE, seconds=10.0)
    assert (found["withdrawn_after_s"], found["failed"]) == (None, 0)
    assert found["v2_answers"] >= 10  # the bound on slow answers has had its say


@pytest.mark.parametrize(
    ("how", "causes"),
    [
        # Where many wait for the second that one batch sleeps, their answers are late before they are slow.
        ("sleeps", ("answers were slow", "no answer within 1 s")),
        ("fails", ("were late: weights of nan",)),
    ],
)
def test_one_that_is_slow_or_fails_is_withdrawn_within_ten_seconds_and_no_request_fails(
    home: Path, how: str, causes: tuple[str, ...]
) -> None:
    with serving(home, how) as server:
        ledger = PromotionLedger(home / "ledger")
        found = trial(ledger, server, SHARE, seconds=20.0)
    assert found["withdrawn_after_s"] is not None
    assert found["withdrawn_after_s"] < ROLLED_BACK_WITHIN_S
    assert any(cause in found["why"] for cause in causes)
    assert found["failed"] == 0
    assert (ledger.reference(), ledger.canary()) == ("v1", None)
