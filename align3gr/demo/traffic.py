"""The demo's interactions as they go over Kafka: what the old system kept, and what users do with slates.

Event ids are made of world, round and place, so publishing a part again repeats its ids and readers keep one
of each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from features.interactions import Interaction, Kind
from policies.lists import Recommendation

from .past import Past
from .reactions import Reaction
from .world import World

SOURCE_OLD = "old-system"
SOURCE_DEMO = "demo"
# The old system's slates lie a day apart; the last one a day before the demo.
_DAY_S = 86_400.0
_READ_S, _SKIM_S = 95.0, 3.0


@dataclass(frozen=True)
class ShownSlate:
    """One slate as it was served, and what its user did."""

    user: int
    request_id: str
    policy_version: str
    items: Sequence[Recommendation]
    reactions: NDArray[np.int8]
    """[k] Reaction of each item, in order."""
    at: float
    """Epoch seconds of the request."""


def past_events(world: World, past: Past, now: float) -> Iterator[Interaction]:
    """The learners' old likes and reads, dated on the days before ``now`` (epoch seconds)."""
    learners = world.size.learners
    days = int(past.steps.max()) + 1
    rows = zip(
        past.users.tolist(), past.items.tolist(), past.steps.tolist(), past.reactions.tolist(), strict=True
    )
    for number, (user, item, step, reaction) in enumerate(rows):
        if user >= learners:
            continue
        at = now - (days - step) * _DAY_S + number % 1000
        stem = f"old-{world.seed}-{number}"
        user_id, item_id = world.user_id(user), world.item_ids[item]
        for event in _answer(stem, user_id, item_id, reaction, at):
            yield replace(event, source=SOURCE_OLD)


def slate_events(world: World, slate: ShownSlate) -> Iterator[Interaction]:
    """Served, impressions and reactions of one slate, in the order they happen."""
    user_id = world.user_id(slate.user)
    for one in slate.items:
        yield Interaction(
            event_id=f"{slate.request_id}-s{one.position}", user_id=user_id, item_id=one.item_id,
            kind=Kind.SERVED, occurred_at=_time(slate.at), request_id=slate.request_id, position=one.position,
            policy_version=slate.policy_version, propensity=_positive(one.propensity), source=SOURCE_DEMO,
        )  # fmt: skip
    for one, reaction in zip(slate.items, slate.reactions.tolist(), strict=True):
        if reaction == Reaction.UNSEEN:
            continue
        stem = f"{slate.request_id}-{one.position}"
        at = slate.at + 0.01 * one.position
        impression = Interaction(
            event_id=f"{stem}-i",
            user_id=user_id,
            item_id=one.item_id,
            kind=Kind.IMPRESSION,
            occurred_at=_time(at),
        )
        answers = _answer(stem, user_id, one.item_id, reaction, at + 0.005)
        for event in (impression, *answers):
            yield replace(event, source=SOURCE_DEMO, request_id=slate.request_id, position=one.position)


def _answer(stem: str, user_id: str, item_id: str, reaction: int, at: float) -> list[Interaction]:
    """The events of one reaction; none for an impression without an answer."""

    def event(kind: Kind, after: float, value: float | None = None) -> Interaction:
        return Interaction(
            event_id=f"{stem}-{kind.value}", user_id=user_id, item_id=item_id, kind=kind,
            occurred_at=_time(at + after), value=value,
        )  # fmt: skip

    if reaction == Reaction.LIKE:
        return [event(Kind.LIKE, 0.001)]
    if reaction == Reaction.READ:
        return [event(Kind.CLICK, 0.001), event(Kind.DWELL, 0.002, _READ_S)]
    if reaction == Reaction.SKIM:
        return [event(Kind.CLICK, 0.001), event(Kind.DWELL, 0.002, _SKIM_S)]
    if reaction == Reaction.DISLIKE:
        return [event(Kind.DISLIKE, 0.001)]
    if reaction == Reaction.HIDE:
        return [event(Kind.HIDE, 0.001)]
    return []


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(0, UTC) + timedelta(seconds=at)


def _positive(propensity: float | None) -> float | None:
    """Kafka's schema wants 0 < p <= 1: float rounding may step out on either side."""
    return None if propensity is None else min(1.0, max(propensity, 1e-300))
