"""What a policy is measured with: cases with one item to be found, and logged slates with levels in force."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.policy import UserContext

from .slates import SlateCase


@dataclass(frozen=True)
class RankingCase:
    """An item to be found in the whole catalogue."""

    user_id: str
    history: tuple[str, ...]
    """Item ids before it, oldest first."""
    target: str
    seen: frozenset[str] | None = None
    """What is left out of the list; none: the history."""


def cases_of(slates: Any, ranking: Any) -> tuple[list[SlateCase], list[RankingCase]]:
    """Cases from the Arrow tables of ``features.cases``."""
    return (
        [
            SlateCase(row["user_id"], tuple(row["history"]), tuple(row["items"]), tuple(row["levels"]))
            for row in slates.select(["user_id", "history", "items", "levels"]).to_pylist()
        ],
        [
            RankingCase(row["user_id"], tuple(row["history"]), row["target"])
            for row in ranking.select(["user_id", "history", "target"]).to_pylist()
        ],
    )


def leave_one_out(
    histories: Mapping[str, Sequence[str]], *, back: int = 1
) -> Iterator[tuple[RankingCase, tuple[str, ...]]]:
    """(case, training history) of each user long enough: the item ``back`` from the end is the target.

    ``back`` 1 is the paper's test item, 2 its validation item; what comes after the target is not used.
    """
    for user, history in histories.items():
        if len(history) > back:
            before = tuple(history[: len(history) - back])
            yield RankingCase(user, before, history[-back]), before


def list_cases(
    slates: Sequence[SlateCase], ranking: Sequence[RankingCase], users: Sequence[str]
) -> list[RankingCase]:
    """One case a user, for the list the user would get: the last ranking case, else the last slate."""
    found = {case.user_id: RankingCase(case.user_id, case.history, "") for case in slates}
    found |= {case.user_id: case for case in ranking}
    return [found[user] for user in users if user in found]


def context_of(case: RankingCase) -> UserContext:
    """The user as a policy is asked about a case."""
    seen = frozenset(case.history) if case.seen is None else case.seen
    return UserContext(case.user_id, case.history, seen - {case.target})
