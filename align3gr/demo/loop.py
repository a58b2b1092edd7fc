"""The whole product on a world with known tastes: recommend, react, Kafka, ingest, RF-DPO, gate, promote.

``WorldDemo.run`` reads like the picture in the README. Every part of it may be killed: what is done is in
``demo.json``, what is not is done again from what was pinned there.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from features.catalogue import Catalogue, Item
from features.duck import connect, view_of
from features.histories import histories, items_of_users, recent_histories, seen
from features.log import FeedbackLog, LogSnapshot
from ingest.producer import FeedbackProducer
from policies.ledger import PromotionLedger
from policies.lists import Recommendation, UserContext
from policies.registry import Registry

from .defaults import DemoOptions, demo_settings
from .past import SLATE, old_engagement
from .reactions import Reaction, react
from .referee import Referee
from .services import DemoFailed, Services, running
from .state import DemoState, RoundRecord
from .traffic import ShownSlate, past_events, slate_events
from .world import World

if TYPE_CHECKING:
    from policies.policy import Policy

Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much (0: not known)."""

LEARNER = "demo"


class WorldDemo:
    """One world in one home directory."""

    def __init__(self, home: Path, state: DemoState, options: DemoOptions, tell: Tell) -> None:
        self.home, self.state, self.options, self._tell = home, state, options, tell
        self.settings = demo_settings(home, options)
        self.registry = Registry(home, self.settings.policies.registry)
        self.ledger = PromotionLedger(home / "ledger")

    def run(self) -> DemoState:
        """From wherever the state is to the last round."""
        started = time.monotonic()
        before = self.state.seconds
        if self.state.finished:
            return self.state
        self._tell("start a broker and ingest", 0, 0)
        with running(self.home, self.settings.ingest, self.settings.features) as services:
            if not self.state.published:
                self._publish_past(services)
            if self.state.base is None:
                self.train_base()
            if self.state.frozen is None:
                self._judge_baselines()
            for number in range(1, self.options.rounds + 1):
                if number > len(self.state.learning):
                    self._round(number, services)
                self.state.seconds = before + time.monotonic() - started
                self._save()
        self._tell("mirror to MLflow", 0, 0)
        self.registry.mirror(self.ledger)
        self.state.finished = True
        self.state.seconds = before + time.monotonic() - started
        self._save()
        return self.state

    @cached_property
    def world(self) -> World:
        """Drawn from the seed, the same at every start."""
        self._tell("make the world", 0, 0)
        return World.make(self.options.seed, self.options.size)

    @cached_property
    def referee(self) -> Referee:
        """Judges on the evaluated users."""
        return Referee(self.world, old_engagement(self.world))

    def _publish_past(self, services: Services) -> None:
        """Load the catalogue; send what the old system kept through Kafka into the log."""
        self._tell("publish the old system's log", 0, 0)
        items = [
            Item(item_id=one.item_id, title=one.title, text=one.text, categories=(one.genre,))
            for one in self.world.items
        ]
        now = datetime.fromtimestamp(self.state.started_at, UTC)
        Catalogue.open(self.home / "catalogue").load(items, now=now)
        past = old_engagement(self.world)
        with FeedbackProducer(services.kafka) as producer:
            for event in past_events(self.world, past, self.state.started_at):
                producer.send(event)
            _require_delivered(producer)
        services.landed(time.time(), self.settings.features)
        self.state.published = True
        self._save()

    def train_base(self) -> None:
        """SCIDs over the catalogue, SFT on the old histories, and the result as the first reference."""
        from trainer.sft.base_policy import train_sft
        from trainer.sft.training import Step
        from trainer.tokenization import fit_codec

        items = Catalogue.open(self.home / "catalogue").items(listed_only=True)
        with connect(self.settings.features) as con:
            table = histories(con, self.snapshot(), self.settings.features)
        past: list[list[str]] = table.column("item_ids").to_pylist()
        codec, staging = self.home / "codec", self.home / "policies" / ".staging-base"
        self._tell("tokenize", 0, 0)
        tokenized = fit_codec(
            items,
            past,
            self.settings.trainer.tokenization,
            codec,
            seed=self.options.seed,
            progress=self._tell,
        )
        staging.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)

        def progress(step: Step) -> None:
            self._tell("train the base policy (SFT)", step.step, step.steps)

        trained = train_sft(
            codec,
            past,
            self.settings.trainer.sft,
            staging,
            texts=[f"{one.title}. {one.text}" for one in self.world.items],
            lineage={"round_id": "base", "created_at": datetime.now(UTC).isoformat()},
            checkpoint=self.home / "sft-checkpoint",
            progress=progress,
        )
        version = self.registry.register(staging, round_id="base")
        if self.ledger.reference() is None:
            self.ledger.promote(version, expects=None, who=LEARNER, why="the base policy, trained by SFT")
        self.state.base = version
        self.state.base_facts = {
            "parameters": trained.parameters,
            "samples": trained.samples,
            "losses": trained.losses,
            "scid": list(tokenized.sizes),
            "histories": len(past),
        }
        self._save()

    def _judge_baselines(self) -> None:
        """The frozen policy, the oracle and chance on the evaluated users."""
        assert self.state.base is not None
        self.state.frozen, _ = self._judge(self.state.base)
        self.state.oracle, self.state.random = self.referee.oracle, self.referee.random
        self._save()

    def _round(self, number: int, services: Services) -> None:
        """Recommend and react, land the feedback, learn, judge the reference that follows."""
        began = time.monotonic()
        if number > len(self.state.rounds):
            reference = self.ledger.reference()
            assert reference is not None, "the base policy was promoted before the first round"
            snapshot = self.snapshot()
            record = RoundRecord(number, time.time(), snapshot.version, reference)
            record.popular = self.referee.popularity(self._likes(snapshot))
            self.state.rounds.append(record)
            self._save()
        record = self.state.rounds[number - 1]
        if not record.landed:
            self._serve(record, services)
        if record.outcome is None:
            self._learn(record)
        reference = self.ledger.reference()
        assert reference is not None
        self._tell(f"round {number}: judge {reference}", 0, 0)
        record.learning, record.coverage = self._judge(reference)
        record.seconds += time.monotonic() - began

    def _serve(self, record: RoundRecord, services: Services) -> None:
        """Show every learner slates of the reference; send what happens to Kafka, wait until it landed."""
        from policies.policy import Policy

        policy = Policy.load(self.registry.path(record.reference), settings=self.settings.policies.decoding)
        snapshot = FeedbackLog.open(self.home / "log").snapshot(record.log_version)
        random = np.random.default_rng([self.options.seed, 3, record.number])
        contexts = self.contexts(snapshot)
        drawn: list[NDArray[np.int8]] = []
        with FeedbackProducer(services.kafka) as producer:
            for turn in range(self.options.slates):
                self._tell(f"round {record.number}: recommend and react", turn, self.options.slates)
                lists = self.lists(policy, contexts, record.number, turn, random)
                items = np.array([[self.world.item_index[one.item_id] for one in found] for found in lists])
                utility = np.take_along_axis(self.world.utility[: len(lists)], items, axis=1)
                reactions = react(utility, random)
                drawn.append(reactions)
                for user, (found, done) in enumerate(zip(lists, reactions, strict=True)):
                    request = f"demo-{self.options.seed}-{record.number}-{turn}-{user}"
                    at = record.served_at + 5.0 * turn
                    slate = ShownSlate(user, request, policy.version, found, done, at)
                    for event in slate_events(self.world, slate):
                        producer.send(event)
                    contexts[user] = after_slate(contexts[user], slate)
            _require_delivered(producer)
        reactions = np.concatenate(drawn)
        liked = np.isin(reactions, (Reaction.LIKE, Reaction.READ))
        disliked = np.isin(reactions, (Reaction.DISLIKE, Reaction.HIDE))
        shown = reactions != Reaction.UNSEEN
        record.levels = {
            "liked": int(liked.sum()),
            "neutral": int((shown & ~liked & ~disliked).sum()),
            "disliked": int(disliked.sum()),
        }
        record.online = float(liked.mean())
        self._tell(f"round {record.number}: feedback lands in the log", 0, 0)
        services.landed(time.time(), self.settings.features)
        record.landed = True
        self._save()

    def _learn(self, record: RoundRecord) -> None:
        """One RF-DPO round over the feedback that has landed; a round that was killed is taken up."""
        from trainer.rounds import resume_round, start_round
        from trainer.workplace import Workplace

        # All that arrived since this round's slates, and not the round before: that ended seconds earlier.
        # The dataset counts back from the log's watermark, which is never ahead of the clock.
        window_s = time.time() - record.served_at + 1.0
        settings = demo_settings(self.home, self.options, window_s=window_s)

        def observe(step: str, done: int, total: int) -> None:
            self._tell(f"round {record.number}: {step}", done, total)

        workplace = Workplace(
            self.home, settings.features, settings.policies, settings.trainer, observe=observe
        )
        last = workplace.rounds.last()
        known = {one.round_id for one in self.state.rounds}
        if last is not None and last.round_id not in known:
            finished = last if last.status == "finished" else resume_round(workplace, last.round_id)
        else:
            finished = start_round(workplace)
        record.round_id = finished.round_id
        record.outcome, record.why = finished.outcome, finished.message
        record.version = finished.steps["register"]["version"]
        self._save()

    def lists(
        self,
        policy: "Policy",
        contexts: list[UserContext],
        number: int,
        turn: int,
        random: np.random.Generator,
    ) -> list[list[Recommendation]]:
        """A slate for every learner: a share of them sampled with propensity, the others the best ten."""
        sampled = random.random(len(contexts)) < self.options.sampled
        lists: list[list[Recommendation]] = [[] for _ in contexts]
        explore = [row for row in range(len(contexts)) if sampled[row]]
        exploit = [row for row in range(len(contexts)) if not sampled[row]]
        seed = int(np.random.default_rng([self.options.seed, 4, number, turn]).integers(2**31))
        for row, found in zip(
            explore, policy.sample([contexts[row] for row in explore], SLATE, seed=seed), strict=True
        ):
            lists[row] = found
        for row, found in zip(
            exploit, policy.recommend([contexts[row] for row in exploit], SLATE), strict=True
        ):
            lists[row] = found
        return lists

    def contexts(self, snapshot: LogSnapshot) -> list[UserContext]:
        """Every learner's recent history and what they have met, from the log at ``snapshot``."""
        with connect(self.settings.features) as con:
            history = items_of_users(recent_histories(con, snapshot, self.settings.features))
            met = items_of_users(seen(con, snapshot))
        users = [self.world.user_id(row) for row in self.world.learners]
        return [
            UserContext(user, tuple(history.get(user, ())), frozenset(met.get(user, ()))) for user in users
        ]

    def _likes(self, snapshot: LogSnapshot) -> NDArray[np.float64]:
        """Liked events of each item in the log, [items]."""
        with connect(self.settings.features) as con:
            view_of(con, "log", snapshot)
            rows = con.execute(
                "select item_id, count(*) from log where level = 1 group by item_id"
            ).fetchall()
        likes = np.zeros(len(self.world.items))
        for item_id, count in rows:
            likes[self.world.item_index[item_id]] = count
        return likes

    def _judge(self, version: str) -> tuple[float, float]:
        """(liked rate, coverage) of a registered policy on the evaluated users."""
        from policies.policy import Policy

        policy = Policy.load(self.registry.path(version), settings=self.settings.policies.decoding)
        lists = policy.recommend(self.referee.contexts, SLATE)
        return self.referee.liked_rate(lists), self.referee.coverage(lists)

    def snapshot(self) -> LogSnapshot:
        """The log as it is now."""
        return FeedbackLog.open(self.home / "log", create=False).snapshot()

    def _save(self) -> None:
        self.state.write(self.home)


def after_slate(context: UserContext, slate: ShownSlate) -> UserContext:
    """The user's context behind a slate: what they looked at is met, what they engaged with is history."""
    met, engaged = set(context.seen), list(context.history)
    for one, reaction in zip(slate.items, slate.reactions.tolist(), strict=True):
        if reaction == Reaction.UNSEEN:
            continue
        met.add(one.item_id)
        if reaction in (Reaction.LIKE, Reaction.READ, Reaction.SKIM):
            engaged.append(one.item_id)
    return dataclasses.replace(context, history=tuple(engaged), seen=frozenset(met))


def _require_delivered(producer: FeedbackProducer) -> None:
    report = producer.flush()
    if report.failed:
        raise DemoFailed(
            f"{len(report.failed)} events were not delivered ({report.failed[0].reason}): start again"
        )
