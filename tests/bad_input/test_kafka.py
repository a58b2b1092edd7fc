"""No broker, no topic, no port, and events of a schema that does not exist yet."""

import socket

import pytest

from features.interactions import encode_interaction
from ingest.broker import Broker
from ingest.settings import KafkaSettings
from ingest.topics import reach
from tests.bad_input.place import Place
from tests.brokers import interaction, raw_rows

FUTURE = (
    b'{"event_id":"9","user_id":"u","item_id":"i","kind":"like",'
    b'"occurred_at":"2024-01-01T00:00:00Z","schema_version":"2.0"}'
)
COMMANDS = [
    ["produce", "events.jsonl"],
    ["ingest"],
    ["ingest", "--until-caught-up"],
    ["rate"],
    ["rate", "--until-caught-up"],
    ["replay", "movielens", "ratings.csv"],
    ["dead-letters", "list"],
    ["dead-letters", "replay"],
    ["status"],
]


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def with_files(place: Place) -> Place:
    place.file("events.jsonl", b"".join(encode_interaction(interaction(n)) + b"\n" for n in range(5)))
    place.file("ratings.csv", "userId,movieId,rating,timestamp\n1,2,5,1000000000\n")
    place.file("movies.csv", "movieId,title,genres\n2,Tea,Drama\n")
    return place


def records(kafka: KafkaSettings, topic: str) -> int:
    return sum(at.end for at in reach(kafka, topic).values())


@pytest.mark.parametrize("arguments", [*COMMANDS, ["broker", "topics"]], ids=" ".join)
def test_an_unreachable_broker_is_a_failure_that_touches_nothing(place: Place, arguments: list[str]) -> None:
    with_files(place).set(KAFKA__BOOTSTRAP_SERVERS=f"127.0.0.1:{closed_port()}", KAFKA__CONNECT_TIMEOUT_S=0.3)
    before, files = place.counts(), place.files()
    place.in_fork(*arguments).refused(1, "no Kafka broker answers", "align3gr broker")
    assert (place.counts(), place.files()) == (before, files)


@pytest.mark.parametrize("servers", ["127.0.0.1:notaport", "nowhere.invalid:9092"])
def test_an_address_that_cannot_be_is_one_line(place: Place, servers: str) -> None:
    with_files(place).set(KAFKA__BOOTSTRAP_SERVERS=servers, KAFKA__CONNECT_TIMEOUT_S=0.3)
    code = 2 if "notaport" in servers else 1
    before, files = place.counts(), place.files()
    place.in_fork("produce", "events.jsonl").refused(code, servers.split(":")[1])
    assert (place.counts(), place.files()) == (before, files)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_missing_topic_is_named_with_the_command_that_makes_it(
    place: Place, embedded_kafka: KafkaSettings, arguments: list[str]
) -> None:
    with_files(place).use(embedded_kafka)
    place.set(KAFKA__TOPIC="missing", KAFKA__DEAD_TOPIC="missing.dead")
    before, files = place.counts(), place.files()
    code = 1 if arguments == ["status"] else 2
    place.in_fork(*arguments).refused(code, "topic missing", "align3gr broker topics")
    assert (place.counts(), place.files()) == (before, files)


def test_a_rater_that_is_no_model_is_one_line(empty: Place, embedded_kafka: KafkaSettings) -> None:
    empty.use(embedded_kafka)
    empty.set(INGEST__RATING__RATER="causal")
    empty.in_fork("rate").refused(2, "ingest.rating: rater causal needs directory")
    (empty.folder / "model").mkdir()
    empty.set(INGEST__RATING__DIRECTORY="model")
    empty.in_fork("rate").refused(2, "rater model: it holds no config.json", "name the local directory")
    (empty.folder / "model" / "config.json").write_text("{")
    empty.in_fork("rate").refused(2, "rater model cannot be loaded", "safetensors")
    assert records(embedded_kafka, embedded_kafka.topic) == 0


def test_produce_reports_what_it_refuses_and_sends_the_rest(
    place: Place, embedded_kafka: KafkaSettings
) -> None:
    place.use(embedded_kafka)
    good = encode_interaction(interaction(1))
    place.file("mixed.jsonl", good + b"\n{\n" + FUTURE + b"\n")
    before = place.counts()
    place.in_fork("produce", "mixed.jsonl").refused(
        2, "2 events were refused", "line 2: bad_json", "validate"
    )
    assert place.counts() == before
    assert records(embedded_kafka, embedded_kafka.topic) == 1


def test_a_schema_from_the_future_becomes_a_dead_letter_and_stops_nobody(
    empty: Place, embedded_kafka: KafkaSettings
) -> None:
    from kafka import KafkaProducer

    empty.use(embedded_kafka)
    with KafkaProducer(bootstrap_servers=embedded_kafka.bootstrap_servers) as producer:
        for value in (FUTURE, encode_interaction(interaction(1))):
            producer.send(embedded_kafka.topic, value, key=b"u")
        producer.flush()
    done = empty.in_fork("ingest", "--until-caught-up", "--json")
    assert (done.code, done.err) == (0, "")
    assert [event_id for event_id, _, _ in raw_rows(empty.home / "log")] == ["e1"]
    assert records(embedded_kafka, embedded_kafka.dead_topic) == 1
    done = empty.in_fork("dead-letters", "list")
    assert (done.code, done.err) == (0, "")
    assert "schema version 2.0 is not 1.x; upgrade align3gr" in done.out


def test_a_broker_does_not_share_a_port(place: Place, embedded: Broker) -> None:
    before, files = place.counts(), place.files(but=["broker"])
    done = place.in_fork("broker", "--kind", "embedded", "--port", str(embedded.port))
    done.refused(2, f"port {embedded.port} is taken", "--port")
    assert (place.counts(), place.files(but=["broker"])) == (before, files)
    assert embedded.running
