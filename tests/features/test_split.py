"""A user's role is fixed by the id alone."""

import pytest

from features.split import bucket_of, role_of, roles_table

USERS = [f"user-{n}" for n in range(5000)]


def test_roles_are_stable_and_have_their_shares() -> None:
    assert [bucket_of(user) for user in ("a", "user-1", "é")] == [bucket_of(u) for u in ("a", "user-1", "é")]
    roles = [role_of(user, 0.2, 0.1) for user in USERS]
    # 5,000 users: the standard error of a share is below 0.6 points; five of them.
    assert roles.count("gate") / len(USERS) == pytest.approx(0.2, abs=0.03)
    assert roles.count("stop") / len(USERS) == pytest.approx(0.1, abs=0.03)


def test_a_larger_gate_keeps_every_gate_user() -> None:
    small = {user for user in USERS if role_of(user, 0.1, 0.1) == "gate"}
    large = {user for user in USERS if role_of(user, 0.3, 0.1) == "gate"}
    assert small < large


def test_the_table_for_joins_agrees_with_the_function() -> None:
    expected = [(user, role_of(user, 0.2, 0.1)) for user in sorted(USERS)]
    table = roles_table(USERS + USERS, 0.2, 0.1)
    assert list(zip(table["user_id"].to_pylist(), table["role"].to_pylist(), strict=True)) == expected


@pytest.mark.parametrize(("gate", "stop"), [(-0.1, 0.1), (0.1, -0.1), (0.6, 0.4)])
def test_shares_that_leave_nobody_to_train_on_are_refused(gate: float, stop: float) -> None:
    with pytest.raises(ValueError, match="share"):
        role_of("u", gate, stop)
