"""Reviews without stars become ratings: which, by whom, once for every reader, whatever dies."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from features.interactions import (
    Interaction,
    InvalidInteraction,
    Kind,
    decode_interaction,
    encode_interaction,
)
from features.levels import Level, LevelRules, level_of
from features.settings import FeatureSettings
from ingest.broker import Broker, embedded_broker, kafka_broker
from ingest.clock import utc_now
from ingest.producer import FeedbackProducer
from ingest.rating import LexiconRater, RatingReport, RatingWorker, rater_of, rating_of, wants_rating
from ingest.settings import IngestSettings, KafkaSettings, RatingSettings
from ingest.topics import create_topics, read_all
from tests.brokers import command_line, interaction, topics_on
from tests.ingest.running import at_work, until

GOOD = "Great guitar, I love it. Works perfectly!"
BAD = "Terrible. It broke after a day and the seller was awful."

running = partial(at_work, join_s=30.0)
wait_until = partial(until, timeout_s=60.0)


class Length:
    """A rater that a test can foretell: 1 to 5 by the number of words; nothing to say about none above."""

    version = "length-1"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def rate(self, texts: Sequence[str]) -> list[int | None]:
        self.seen += texts
        return [n if (n := len(text.split())) <= 5 else None for text in texts]


def review(n: int, words: str | None = GOOD, **changes: object) -> Interaction:
    return interaction(n, **{"kind": Kind.REVIEW, "value": None, "text": words, **changes})


def worker(kafka: KafkaSettings, rater: object = None, *, from_start: bool = False, **rating: object):  # type: ignore[no-untyped-def]
    """A worker of a group of its own with short times."""
    chosen = RatingSettings.model_validate({"group": f"{kafka.topic}-rate", "batch_reviews": 8, **rating})
    ingest = IngestSettings(session_timeout_s=1.2, heartbeat_s=0.3, rating=chosen)
    given = rater or Length()
    return RatingWorker(kafka, ingest, FeatureSettings(), given, from_start=from_start)  # type: ignore[arg-type]


def send(kafka: KafkaSettings, events: Sequence[Interaction]) -> None:
    with FeedbackProducer(kafka) as producer:
        for event in events:
            producer.send(event)
        assert producer.flush().failed == []


def ratings(kafka: KafkaSettings) -> list[Interaction]:
    """Every rating of ours in the topic, as often as it lies there."""
    found = []
    for record in read_all(kafka, kafka.topic):
        try:
            event = decode_interaction(record.value or b"", now=utc_now())
        except InvalidInteraction:
            continue
        if event.source == "align3gr-rater":
            found.append(event)
    return found


def rated_ids(kafka: KafkaSettings) -> list[str]:
    """The reviews that were rated, each once: what a reader that deduplicates by event id sees."""
    once = {(event.user_id, event.event_id): event.extra["rated_event_id"] for event in ratings(kafka)}
    return sorted(once.values(), key=lambda name: int(name[1:]))


# -- what is rated, and how --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (review(1), True),
        (review(1, value=4.0), False),
        (review(1, value=0.0), False),
        (review(1, None), False),
        (review(1, "  \n"), False),
        (review(1, kind=Kind.COMMENT), False),
        (interaction(1, text=GOOD, value=None), False),
        (interaction(1, kind=Kind.LIKE, text=GOOD, value=None), False),
    ],
)
def test_only_a_review_with_words_and_without_stars_is_rated(event: Interaction, wanted: bool) -> None:
    assert wants_rating(event, RatingSettings()) is wanted


def test_comments_are_rated_where_the_settings_say_so() -> None:
    assert wants_rating(review(1, kind=Kind.COMMENT), RatingSettings(kinds=("review", "comment")))


def test_a_rating_is_of_the_same_user_item_request_and_moment_and_its_id_follows() -> None:
    given = review(3, request_id="r.signed", source="shop", extra={"page": 2})
    rated = rating_of(given, 4, "v1")
    assert (rated.user_id, rated.item_id, rated.request_id) == (given.user_id, given.item_id, "r.signed")
    assert (rated.occurred_at, rated.kind, rated.value) == (given.occurred_at, Kind.RATING, 4.0)
    assert rated.extra == {"rated_event_id": "e3", "rater": "v1"}
    assert rated.event_id == rating_of(given, 2, "v1").event_id
    others = [rating_of(given, 4, "v2"), rating_of(review(4), 4, "v1")]
    others.append(rating_of(review(3, user_id="another"), 4, "v1"))
    assert len({rated.event_id} | {one.event_id for one in others}) == 4
    assert decode_interaction(encode_interaction(rated), now=utc_now()) == rated


def test_ratings_fall_on_the_papers_scale_whatever_the_scale_of_the_reviews_source() -> None:
    jokes = review(1, source="jester")
    assert level_of(jokes, LevelRules()) is None
    levels = [level_of(rating_of(jokes, n, "v"), LevelRules()) for n in range(1, 6)]
    assert levels == [Level.DISLIKED, Level.NEUTRAL, Level.NEUTRAL, Level.LIKED, Level.LIKED]


def test_the_lexicon_tells_good_from_bad_and_says_nothing_about_nothing() -> None:
    rater = rater_of(RatingSettings())
    good, bad, silent, foreign = rater.rate([GOOD, BAD, "Model 42 B, black.", "Le câble est arrivé mardi."])
    assert (good, bad, silent, foreign) == (5, 1, None, None)


def test_the_lexicons_version_names_bounds_and_length_read() -> None:
    rater = LexiconRater(RatingSettings())
    assert rater.version == LexiconRater(RatingSettings(group="other", batch_reviews=3)).version
    moved = LexiconRater(RatingSettings(bounds=(-0.5, -0.1, 0.1, 0.9)))
    short = LexiconRater(RatingSettings(max_chars=30))
    assert len({rater.version, moved.version, short.version}) == 3
    assert moved.rate(["Great, I love it."]) == [4] != rater.rate(["Great, I love it."])
    assert short.rate([f"{'Nothing to say here at all.' * 3} {BAD}"]) == [None]


# -- the worker --------------------------------------------------------------------------------------------


def test_reviews_without_stars_become_ratings_and_nothing_else_does(kafka: KafkaSettings) -> None:
    raw = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers)
    for value in (b"{nope", None, encode_interaction(review(9, schema_version="2.0"))):
        raw.send(kafka.topic, key=b"k", value=value)
    raw.close()
    events = [interaction(n) for n in range(40)]
    events += [review(100 + n, "w " * (1 + n % 6)) for n in range(24)]
    events += [review(200, value=5.0), review(201, None)]
    send(kafka, events)
    report = worker(kafka).run(until_caught_up=True)
    assert (report.rated, report.silent, report.with_stars) == (20, 4, 1)
    assert (report.events, dict(report.by_rating)) == (69, dict.fromkeys(range(1, 6), 4))
    expected = {(f"e{100 + n}", 1.0 + n % 6) for n in range(24) if n % 6 < 5}
    found = ratings(kafka)
    assert {(event.extra["rated_event_id"], event.value) for event in found} == expected
    assert len(found) == 20
    places = {(record.key, record.partition) for record in read_all(kafka, kafka.topic)}
    assert len(places) == len({key for key, _ in places})  # a rating lies behind its review


def test_a_run_goes_on_where_the_group_stands_and_begins_again_when_asked(
    embedded_kafka: KafkaSettings,
) -> None:
    send(embedded_kafka, [review(n, "one two") for n in range(30)])
    assert worker(embedded_kafka).run(until_caught_up=True).rated == 30
    send(embedded_kafka, [review(n, "one two") for n in range(30, 50)])
    assert worker(embedded_kafka).run(until_caught_up=True).rated == 20
    # What a worker does that died before it could commit, too: one event to whoever counts an id once.
    assert worker(embedded_kafka, from_start=True).run(until_caught_up=True).rated == 50
    assert len(ratings(embedded_kafka)) == 100
    assert rated_ids(embedded_kafka) == [f"e{n}" for n in range(50)]
    other = Length()
    other.version = "length-2"  # type: ignore[misc]
    assert worker(embedded_kafka, other, from_start=True).run(until_caught_up=True).rated == 50
    assert len({event.event_id for event in ratings(embedded_kafka)}) == 100


def test_two_workers_share_the_partitions(embedded_kafka: KafkaSettings) -> None:
    kafka = embedded_kafka
    first, second = worker(kafka), worker(kafka)
    with running(first) as first_ended:
        send(kafka, [review(n, "one two") for n in range(60)])
        wait_until(lambda: first.report.rated >= 60 and len(rated_ids(kafka)) == 60)
        with running(second) as second_ended:
            wait_until(lambda: second.report.claims)
            send(kafka, [review(n, "one two") for n in range(60, 160)])
            wait_until(lambda: first.report.rated + second.report.rated >= 160)
    assert rated_ids(kafka) == [f"e{n}" for n in range(160)]
    assert all(isinstance(one, RatingReport) for one in first_ended + second_ended)
    assert second.report.rated > 0


def test_a_broker_that_dies_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    with embedded_broker(tmp_path / "broker") as node:
        kafka = topics_on(node, delivery_timeout_s=2.0, connect_timeout_s=0.5)
        send(kafka, [review(n, "one two") for n in range(20)])
        one = worker(kafka)
        with running(one) as ended:
            wait_until(lambda: one.report.rated >= 20 and len(rated_ids(kafka)) == 20)
            node.kill()
            time.sleep(1.0)
            node.start()  # memory only: nothing is left, so it is another topic with offsets of its own
            create_topics(kafka)
            send(kafka, [review(n, "one two") for n in range(20, 35)])
            wait_until(lambda: one.report.rated >= 35)
            assert rated_ids(kafka) == [f"e{n}" for n in range(20, 35)]
    assert isinstance(ended[0], RatingReport), ended


@pytest.mark.slow
@pytest.mark.kafka
def test_a_killed_broker_that_keeps_its_topic_loses_no_rating(real_kafka: Broker, tmp_path: Path) -> None:
    with kafka_broker(tmp_path) as node:
        kafka = topics_on(node, delivery_timeout_s=5.0, connect_timeout_s=1.0)
        send(kafka, [review(n, "one two") for n in range(200)])
        one = worker(kafka)
        with running(one) as ended:
            wait_until(lambda: one.report.rated >= 8)
            node.kill()
            time.sleep(1.0)
            node.start()
            send(kafka, [review(n, "one two") for n in range(200, 240)])
            # Repeats are counted as rated too, so the counter alone does not say that all are.
            wait_until(lambda: one.report.rated >= 240 and len(rated_ids(kafka)) == 240, timeout_s=90.0)
        assert rated_ids(kafka) == [f"e{n}" for n in range(240)]
    assert isinstance(ended[0], RatingReport), ended


@pytest.mark.kafka
def test_a_topic_made_anew_under_a_running_worker_is_read_from_its_start(real_kafka: Broker) -> None:
    kafka = topics_on(real_kafka)
    send(kafka, [review(n, "one two") for n in range(20)])
    one = worker(kafka)
    with running(one) as ended:
        wait_until(lambda: one.report.rated >= 20 and len(rated_ids(kafka)) == 20)
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.delete_topics([kafka.topic])
        create_topics(kafka)
        send(kafka, [review(n, "one two") for n in range(20, 50)])
        wait_until(lambda: one.report.rated >= 50)
    assert isinstance(ended[0], RatingReport)
    assert rated_ids(kafka) == [f"e{n}" for n in range(20, 50)]


def test_offsets_beyond_the_topics_end_are_not_believed(embedded_kafka: KafkaSettings) -> None:
    send(embedded_kafka, [review(n, "one two") for n in range(10)])
    with KafkaConsumer(
        bootstrap_servers=embedded_kafka.bootstrap_servers, group_id=f"{embedded_kafka.topic}-rate"
    ) as consumer:
        places = [TopicPartition(embedded_kafka.topic, p) for p in (0, 1)]
        consumer.assign(places)
        consumer.commit({place: OffsetAndMetadata(900, "", -1) for place in places})
    assert worker(embedded_kafka).run(until_caught_up=True).rated == 10


@pytest.mark.slow
def test_sigterm_ends_it_cleanly_with_the_report(embedded_kafka: KafkaSettings, tmp_path: Path) -> None:
    send(embedded_kafka, [review(n) for n in range(12)] + [review(12, BAD)])
    command, environment = command_line(
        embedded_kafka, tmp_path, "rate", "--json", INGEST__RATING__GROUP=embedded_kafka.topic
    )
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(lambda: len(ratings(embedded_kafka)) == 13)
        os.kill(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert '"rated": 13' in out
    assert '"by_rating": {"1": 1, "5": 12}' in out
    assert err.count("\n") == 1
    assert "rater lexicon-" in err
