"""Settings that cannot be, commands that are not written out, files that are not there or not text."""

import pytest

from tests.bad_input.place import Place

EVENT = '{"event_id":"1","user_id":"u","item_id":"i","kind":"like","occurred_at":"2024-01-01T00:00:00Z"'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param("kafkaa: {}\n", ["kafkaa", "no such setting"], id="unknown-room"),
        pytest.param("kafka: {topicc: x}\n", ["kafka.topicc", "no such setting"], id="unknown-key"),
        pytest.param("server: {port: 99999}\n", ["server.port", "65535"], id="impossible-value"),
        pytest.param("policies: {gate: {share: 7}}\n", ["policies.gate.share"], id="impossible-share"),
        pytest.param("kafka: {bootstrap_servers: ''}\n", ["host:port"], id="no-broker-named"),
        pytest.param("home: [\n", ["align3gr.yaml", "cannot be read"], id="not-yaml"),
        pytest.param("- home\n", ["align3gr.yaml", "keys and values"], id="a-list"),
        pytest.param(b"home: \xff\xfe\n", ["align3gr.yaml", "utf-8"], id="not-utf-8"),
    ],
)
def test_a_settings_file_that_cannot_be_is_refused(
    empty: Place, content: str | bytes, says: list[str]
) -> None:
    empty.file("align3gr.yaml", content)
    empty.in_fork("status").refused(2, "settings", *says)
    assert not empty.home.exists()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        pytest.param("HOEM", "x", "ALIGN3GR_HOEM", id="unknown-room"),
        pytest.param("KAFKA__TOPICC", "x", "kafka.topicc", id="unknown-key"),
        pytest.param("KAFKA__PARTITIONS", "many", "kafka.partitions", id="impossible-value"),
        pytest.param("KAFKA", "{", "ALIGN3GR_KAFKA__TOPIC", id="not-json"),
        pytest.param("SERVER__API_KEY", "", "server.api_key", id="empty-key"),
    ],
)
def test_an_environment_variable_that_cannot_be_is_refused(
    empty: Place, name: str, value: str, says: str
) -> None:
    empty.set(**{name: value})
    empty.in_fork("status").refused(2, "settings", says)
    assert not empty.home.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["bogus"], "No such command 'bogus'", id="command"),
        pytest.param(["catalogue"], "a command is missing", id="sub-command"),
        pytest.param(["produce", "--bogus"], "No such option", id="option"),
        pytest.param(["produce"], "Missing argument 'file'", id="produce"),
        pytest.param(["validate"], "Missing argument 'file'", id="validate"),
        pytest.param(["catalogue", "load"], "Missing argument 'file'", id="catalogue-load"),
        pytest.param(["replay", "movielens"], "Missing argument 'path'", id="replay"),
        pytest.param(["recommend"], "Missing argument", id="recommend"),
        pytest.param(["ingest", "--workers", "0"], "--workers", id="workers"),
        pytest.param(["serve", "--port", "70000"], "--port", id="port"),
        pytest.param(["round", "--seed", "x"], "--seed", id="seed"),
        pytest.param(["round", "--device", "tpu"], "device tpu", id="device"),
        pytest.param(["broker", "--kind", "rabbit"], "rabbit", id="broker-kind"),
        pytest.param(["--settings", "none.yaml", "status"], "none.yaml cannot be read", id="no-settings"),
        pytest.param(["--settings", ".", "status"], "directory", id="settings-folder"),
        pytest.param(["validate", "none.jsonl"], "none.jsonl cannot be read", id="no-events"),
        pytest.param(["validate", "."], "directory", id="events-folder"),
        pytest.param(["catalogue", "load", "none.csv"], "none.csv cannot be read", id="no-items"),
        pytest.param(["replay", "movielens", "none"], "none does not exist", id="no-dataset"),
    ],
)
def test_a_command_that_lacks_something_says_what(empty: Place, arguments: list[str], says: str) -> None:
    empty.in_fork(*arguments).refused(2, says)
    assert not empty.home.exists()


@pytest.mark.parametrize(
    ("name", "content", "arguments", "says"),
    [
        pytest.param("e", b"\xff\xfe{}\n", ["validate", "e"], "1 of 1", id="validate"),
        pytest.param("e", b"\xff\xfe{}\n", ["evaluate", "--held-out", "e"], "line 1", id="held-out"),
        pytest.param("e.gz", b"not gzip", ["validate", "e.gz"], "cannot be read", id="not-gzip"),
        pytest.param("m", b"kinds: \xff\n", ["validate", "-", "--mapping", "m"], "mapping m", id="mapping"),
        pytest.param("i.csv", b"item_id,title\n1,\xff\n", ["catalogue", "load", "i.csv"], "utf-8", id="csv"),
        pytest.param("i.json", b'{"item_id":"\xff"}', ["catalogue", "load", "i.json"], "utf-8", id="jsonl"),
        pytest.param("i.parquet", b"PAR1", ["catalogue", "load", "i.parquet"], "parquet", id="parquet"),
        pytest.param(
            "ratings.csv",
            b"userId,movieId,rating,timestamp\n1,\xff,5,1\n",
            ["replay", "movielens", "ratings.csv"],
            "MovieLens",
            id="movielens",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_changes_nothing(
    place: Place, name: str, content: bytes, arguments: list[str], says: str
) -> None:
    place.file(name, content)
    before, files = place.counts(), place.files()
    place.in_fork(*arguments).refused(2, says)
    assert (place.counts(), place.files()) == (before, files)


def test_a_schema_from_the_future_is_refused_before_anything_is_sent(empty: Place) -> None:
    empty.file("future.jsonl", f'{EVENT},"schema_version":"2.0"}}\n{EVENT},"schema_version":"1.9"}}\n')
    done = empty.in_fork("validate", "future.jsonl")
    done.refused(2, "1 of 2 events would be refused")
    assert "line 1: unknown_major_version" in done.out
    assert not empty.home.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["recommend", "user-000", "--device", "cuda:7"], "cuda:7", id="recommend"),
        pytest.param(["round", "--resume", "r9999"], "r9999", id="round"),
        pytest.param(["features", "show", "nobody"], "nobody", id="features"),
        pytest.param(["sft", "--backbone", "none"], "none", id="sft"),
        pytest.param(["codec", "encode", "nix"], "nix", id="codec"),
        pytest.param(["serve", "--host", "0.0.0.0"], "server.api_key", id="serve"),
    ],
)
def test_no_library_says_a_word_on_the_way_to_an_error(place: Place, arguments: list[str], says: str) -> None:
    """Started from nothing: torch, transformers, Feast and all are imported on the way."""
    before = place.counts()
    done = place.run(*arguments)
    done.refused(2, says)
    assert (done.out, len(done.err.splitlines())) == ("", 1)
    assert place.counts() == before
