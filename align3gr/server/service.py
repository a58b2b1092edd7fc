"""What a recommendation goes through: who is the user, which policy, which items, and the record of it.

A batch is decoded with one policy object from beginning to end, so every slate names the policy that made it.
A canary's users are decoded in a lane of their own, against a deadline; where it fails or is late the
reference answers, so that a bad canary costs its users time and never an answer.
"""

import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from features.errors import FeaturesError, ProductError
from features.interactions import Interaction, Kind
from features.online.contexts import UserFeatures
from features.requests import sign_request

from .batching import Batcher, Overloaded
from .canary import CanaryWatch, Outcome
from .eligible import EligibleItems
from .events import EventRecorder
from .metrics import ServerMetrics
from .settings import ServerSettings
from .swap import PolicySwap, Served, Trial

if TYPE_CHECKING:
    from policies.policy import Eligible, Policy, Recommendation
    from policies.settings import CanarySettings

log = logging.getLogger(__name__)

SOURCE = "align3gr-server"
"""``source`` of the served events."""


class NoPolicy(ProductError):  # noqa: N818 - reads as what it is
    """Nothing has been promoted yet, or nothing that was could be loaded."""


class CanaryGone(ProductError):  # noqa: N818
    """The canary that a request was meant for ended while it waited."""


class Features(Protocol):
    """The part of ``features.online.OnlineFeatures`` that serving needs."""

    def contexts(self, user_ids: Sequence[str]) -> list[UserFeatures]:
        """What is known of each user."""
        ...


@dataclass(frozen=True)
class Ask:
    """One request as it waits for its decode."""

    request_id: str
    user_id: str
    k: int
    sampled: bool
    canary: int | None = None
    """``seq`` of the canary that is to answer; none: the reference."""


@dataclass(frozen=True)
class Slate:
    """One answer, and the facts that are recorded of it."""

    request_id: str
    user_id: str
    policy_version: str
    served_at: datetime
    sampled: bool
    degraded: bool
    """The online store did not answer: the user was treated as unknown."""
    items: "tuple[Recommendation, ...]"


class Recommender:
    """Answers requests from the policy that ``swap`` holds. One object a server, used from its event loop."""

    def __init__(
        self,
        swap: "PolicySwap[Policy]",
        features: Features,
        eligible: EligibleItems,
        recorder: EventRecorder | None,
        metrics: ServerMetrics,
        settings: ServerSettings,
        *,
        request_key: bytes | None = None,
        random_source: random.Random | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        prepare: Callable[[], None] = lambda: None,
        canary: "CanarySettings | None" = None,
    ) -> None:
        """``recorder`` None records nothing; ``prepare`` runs once in each decoding thread; ``canary`` None
        takes the defaults, for a canary that a person started.
        """
        from policies.settings import CanarySettings

        canary = canary or CanarySettings()
        self.swap, self.features, self.eligible, self.recorder = swap, features, eligible, recorder
        self.metrics, self.settings = metrics, settings
        self._key, self._now = request_key, now
        self._random = random_source or random.Random()

        def lane(decode: Callable[[Sequence[Ask]], list[Slate]], seconds: float) -> Batcher[Ask, Slate]:
            return Batcher(
                decode,
                size=settings.batch_size,
                queue=settings.queue_size,
                timeout_seconds=seconds,
                prepare=prepare,
            )

        self._batcher = lane(self._decode, settings.request_timeout_seconds)
        self._canary_batcher = lane(self._decode_canary, canary.deadline_s)
        self._watch = CanaryWatch(canary, swap.refuse, metrics)
        self._eligible: dict[bool, tuple[Policy, frozenset[str] | None, Eligible]] = {}
        self.features_error: str | None = None

    def start(self) -> None:
        """Begin to answer; call it from the event loop."""
        self._batcher.start()
        self._canary_batcher.start()

    async def stop(self) -> None:
        """Answer what is in work, refuse what waits."""
        await self._canary_batcher.stop()
        await self._batcher.stop()

    async def recommend(self, user_id: str, k: int) -> Slate:
        """k items for ``user_id`` (fewer only when fewer are eligible), recorded.

        Raises NoPolicy and ``batching.Overloaded``.
        """
        if self.swap.current is None:
            raise NoPolicy(_no_policy(self.swap.state().error))
        plain = uuid.UUID(int=self._random.getrandbits(128), version=4).hex
        request_id = sign_request(self._key, plain, user_id) if self._key else plain
        sampled = self._random.random() < self.settings.sample_share
        slate = await self._answer(Ask(request_id, user_id, k, sampled))
        if self.recorder is not None:
            self.recorder.record(served_events(slate))
        self._count(slate)
        return slate

    async def _answer(self, ask: Ask) -> Slate:
        """From the canary where the user takes part; else, and where it does not answer, the reference."""
        from policies.shares import takes_part

        trial = self.swap.trial
        if trial is None or not takes_part(ask.user_id, trial.canary):
            started = time.perf_counter()
            slate = await self._batcher.submit(ask)
            self._watch.reference_answered(time.perf_counter() - started)
            return slate
        return await self._canary_answer(ask, trial)

    async def _canary_answer(self, ask: Ask, trial: "Trial[Policy]") -> Slate:
        started = time.perf_counter()
        try:
            slate = await self._canary_batcher.submit(replace(ask, canary=trial.canary.seq))
        except CanaryGone:
            return await self._batcher.submit(ask)
        except Exception as error:  # noqa: BLE001 - however the canary fails, its users get their answer
            again = time.perf_counter()
            slate = await self._batcher.submit(ask)  # what fails here, too, is not the canary's fault
            ended = time.perf_counter()
            self._watch.reference_answered(ended - again)
            outcome: Outcome = "late" if isinstance(error, Overloaded) else "failed"
            cause = " ".join(str(error).split())[:200]
            self._watch.failed(trial.canary, outcome, ended - started, cause)
            return slate
        self._watch.answered(trial.canary, time.perf_counter() - started)
        return slate

    def _decode(self, asks: Sequence[Ask]) -> list[Slate]:
        """In the worker thread, with the reference."""
        served = self.swap.current
        if served is None:
            raise NoPolicy(_no_policy(self.swap.state().error))
        return self._decode_with(served, asks)

    def _decode_canary(self, asks: Sequence[Ask]) -> list[Slate]:
        """In the canary's worker thread, with the canary that all ``asks`` were meant for."""
        trial = self.swap.trial
        if trial is None or any(ask.canary != trial.canary.seq for ask in asks):
            raise CanaryGone("the canary has ended")
        return self._decode_with(trial, asks)

    def _decode_with(self, served: "Served[Policy]", asks: Sequence[Ask]) -> list[Slate]:
        """One policy object, one read of the online store, one search a kind of ask."""
        started = time.perf_counter()
        known, degraded = self._contexts(sorted({ask.user_id for ask in asks}))
        slates: dict[str, Slate] = {}
        for group in _alike(asks):
            for ask, items in zip(group, self._search(served.policy, group, known), strict=True):
                slates[ask.request_id] = Slate(
                    request_id=ask.request_id,
                    user_id=ask.user_id,
                    policy_version=served.version,
                    served_at=self._now(),
                    sampled=ask.sampled,
                    degraded=degraded,
                    items=tuple(items),
                )
        self.metrics.decode.observe(time.perf_counter() - started)
        self.metrics.batch.observe(len(asks))
        return [slates[ask.request_id] for ask in asks]

    def _search(
        self, policy: "Policy", asks: Sequence[Ask], known: Mapping[str, UserFeatures]
    ) -> "list[list[Recommendation]]":
        """Items for ``asks``, which are alike in k and in being sampled."""
        from policies.policy import UserContext

        users = [
            UserContext(user_id=ask.user_id, history=known[ask.user_id].history, seen=known[ask.user_id].seen)
            for ask in asks
        ]
        eligible = self._eligible_for(policy, lane=asks[0].canary is not None)
        if asks[0].sampled:
            return policy.sample(users, asks[0].k, seed=self._random.getrandbits(63), eligible=eligible)
        return policy.recommend(users, asks[0].k, eligible=eligible)

    def _eligible_for(self, policy: "Policy", *, lane: bool) -> "Eligible":
        """The listed items as this policy numbers them, worked out once for each policy and catalogue.

        ``lane``: whether it is the canary's; each lane is one thread and keeps its own.
        """
        items = self.eligible.items
        known = self._eligible.get(lane)
        if known is None or known[0] is not policy or known[1] is not items:
            known = self._eligible[lane] = (policy, items, policy.eligible(items))
        return known[2]

    def _contexts(self, user_ids: Sequence[str]) -> tuple[dict[str, UserFeatures], bool]:
        """What is known of the users, and whether the online store failed to say."""
        try:
            known = self.features.contexts(user_ids)
        except FeaturesError as error:
            self.metrics.degraded.inc(len(user_ids))
            if self.features_error is None:
                log.error("online_store=unavailable cause=%s users=treated_as_unknown", error)
            self.features_error = str(error)
            return {user_id: UserFeatures(user_id) for user_id in user_ids}, True
        self.features_error = None
        return {one.user_id: one for one in known}, False

    def _count(self, slate: Slate) -> None:
        for source in {item.source for item in slate.items}:
            self.metrics.items.labels(source).inc(sum(item.source == source for item in slate.items))
        if slate.sampled:
            self.metrics.sampled.inc()


def served_events(slate: Slate) -> list[Interaction]:
    """The facts of a slate as ``served`` events, one an item; their ids derive from the request's."""
    return [
        Interaction(
            event_id=f"served-{slate.request_id.partition('.')[0]}-{item.position}",
            user_id=slate.user_id,
            item_id=item.item_id,
            kind=Kind.SERVED,
            occurred_at=slate.served_at,
            request_id=slate.request_id,
            position=item.position,
            policy_version=slate.policy_version,
            propensity=item.propensity,
            source=SOURCE,
        )
        for item in slate.items
    ]


def _alike(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Asks that one search can answer: same k, same kind, and no user twice in a sampled one."""
    groups: dict[tuple[bool, int, int], list[Ask]] = {}
    sampled_before: Counter[str] = Counter()
    for ask in asks:
        nth = sampled_before[ask.user_id] if ask.sampled else 0
        sampled_before[ask.user_id] += ask.sampled
        groups.setdefault((ask.sampled, ask.k, nth), []).append(ask)
    return list(groups.values())


def _no_policy(cause: str | None) -> str:
    if cause:
        return f"no policy serves: {cause}"
    return "no policy has been promoted yet; run align3gr sft, then align3gr policy promote"
