"""``schema``, ``validate``, ``produce``, ``replay`` and ``catalogue`` from the command line."""

import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from align3gr.__main__ import app
from align3gr.console import run
from features import json_schema
from features.catalogue import Catalogue
from ingest.broker import Broker
from tests.brokers import topics_on

GOOD = {
    "event_id": "1",
    "user_id": "u",
    "item_id": "i",
    "kind": "like",
    "occurred_at": "2024-01-01T00:00:00Z",
}


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = run(app, [str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts_of(out: str) -> dict[str, Any]:
    facts = json.loads(out.splitlines()[-1])
    assert isinstance(facts, dict)
    return facts


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN3GR_HOME", str(tmp_path / "var"))
    return tmp_path


@pytest.fixture
def kafka(home: Path, embedded: Broker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of commands that find a broker with topics of their own."""
    settings = topics_on(embedded)
    monkeypatch.setenv("ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS", settings.bootstrap_servers)
    monkeypatch.setenv("ALIGN3GR_KAFKA__TOPIC", settings.topic)
    return home


def events_file(home: Path, *events: object) -> Path:
    file = home / "events.jsonl"
    file.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in events))
    return file


def ratings(home: Path) -> Path:
    rows = [(u, i, 5 if u == i else 2, 1_000_000_000 + 100 * u + i) for u in range(4) for i in range(4)]
    text = "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
    (home / "ratings.csv").write_text(text)
    films = "".join(f"{i},{'Film ' + str(i) if i else ''},Drama\n" for i in range(4))
    (home / "movies.csv").write_text("movieId,title,genres\n" + films)
    return home / "ratings.csv"


def test_schema_prints_the_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "schema")
    assert (code, json.loads(out)) == (0, json_schema())


def test_validate_accepts_a_good_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "validate", events_file(home, GOOD, "", GOOD), "--json")
    assert (code, err) == (0, "")
    assert facts_of(out) == {"accepted": 2, "refused": 0, "dropped": 0, "reasons": {}, "problems": []}


def test_validate_names_the_lines_and_the_reasons(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = events_file(home, GOOD, "", "{", GOOD | {"kind": "adore"})
    code, out, err = call(capsys, "validate", file)
    assert code == 2
    assert out.splitlines()[0].startswith("line 3: bad_json")
    assert out.splitlines()[1].startswith("line 4: unknown_kind")
    assert err == "align3gr: 2 of 3 events would be refused; nothing was sent\n"
    code, out, _ = call(capsys, "validate", file, "--json")
    assert code == 2
    assert [problem["line"] for problem in facts_of(out)["problems"]] == [3, 4]


def test_validate_reads_standard_input_through_a_mapping(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "m.yaml").write_text("fields: {kind: action}\nkinds: {loved: like, ping: null}\n")
    theirs = {name: value for name, value in GOOD.items() if name != "kind"}
    text = json.dumps(theirs | {"action": "loved"}) + "\n" + json.dumps(theirs | {"action": "ping"}) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, _ = call(capsys, "validate", "-", "--mapping", home / "m.yaml", "--json")
    facts = facts_of(out)
    assert (code, facts["accepted"], facts["dropped"], facts["refused"]) == (0, 1, 1, 0)


def test_produce_sends_what_is_good_and_reports_the_rest(
    kafka: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "produce", events_file(kafka, GOOD, GOOD | {"event_id": "2"}), "--json")
    assert (code, err) == (0, "")
    assert facts_of(out) == {"sent": 2, "acknowledged": 2, "undelivered": 0, "refused": 0}
    code, out, err = call(capsys, "produce", events_file(kafka, GOOD, "{"), "--json")
    assert code == 2
    assert facts_of(out) == {"sent": 1, "acknowledged": 1, "undelivered": 0, "refused": 1}
    assert "line 2: bad_json" in err


def test_replay_sends_the_events_and_loads_the_catalogue(
    kafka: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, "replay", "movielens", ratings(kafka), "--json")
    assert code == 0
    assert facts_of(out) == {
        "dataset": "movielens", "events": 16, "catalogue_items": 3, "items_without_text": 1,
        "sent": 16, "acknowledged": 16, "undelivered": 0,
    }  # fmt: skip
    assert "1 items have neither title nor text" in err
    assert Catalogue.open(kafka / "var" / "catalogue").show("2").title == "Film 2"


def test_replay_filters_splits_and_limits(kafka: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--k-core", 2, "--leave-out", 1, "--held-out", kafka / "held.jsonl", "--limit", 5]
    code, out, _ = call(
        capsys, "replay", "movielens", ratings(kafka), *arguments, "--no-catalogue", "--speed", 1e6, "--json"
    )
    facts = facts_of(out)
    assert (code, facts["events"], facts["held_out"], facts["acknowledged"]) == (0, 5, 4, 5)
    assert not (kafka / "var" / "catalogue").exists()
    code, out, _ = call(capsys, "validate", kafka / "held.jsonl", "--json")
    assert (code, facts_of(out)["accepted"]) == (0, 4)


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def test_an_unreachable_broker_is_one_line_and_touches_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN3GR_KAFKA__BOOTSTRAP_SERVERS", f"127.0.0.1:{closed_port()}")
    monkeypatch.setenv("ALIGN3GR_KAFKA__CONNECT_TIMEOUT_S", "0.5")
    for arguments in (["produce", events_file(home, GOOD)], ["replay", "movielens", ratings(home)]):
        code, out, err = call(capsys, *arguments)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "no Kafka broker answers" in err
    assert not (home / "var" / "catalogue").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["validate", "none.jsonl"], "none.jsonl cannot be read"),
        (["validate", "ratings.csv", "--mapping", "none.yaml"], "none.yaml cannot be read"),
        (["produce", "events.jsonl.gz"], "cannot be read"),
        (["replay", "netflix", "ratings.csv"], "no importer netflix"),
        (["replay", "movielens", "none.csv"], "does not exist"),
        (["replay", "movielens", "ratings.csv", "--leave-out", "1"], "--held-out"),
        (["replay", "movielens", "ratings.csv", "--leave-out", "1", "--held-out", "no/held"], "no/held"),
        (["replay", "movielens", "ratings.csv", "--speed", "0"], "--speed"),
        (["replay", "movielens", "ratings.csv", "--k-core", "9"], "no event"),
        (["catalogue", "load", "none.jsonl"], "none.jsonl cannot be read"),
        (["catalogue", "load", "events.jsonl.gz"], "cannot be read"),
        (["catalogue", "load", "ratings.txt"], "--format"),
        (["catalogue", "load", "movies.csv"], "item_id"),
        (["catalogue", "load", "items.jsonl"], "line 2"),
        (["catalogue", "load", "no-text.jsonl"], "--allow-no-text"),
        (["catalogue", "show", "x"], "no catalogue"),
        (["catalogue", "delist", "x"], "no catalogue"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    kafka: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    ratings(kafka)
    (kafka / "events.jsonl.gz").write_bytes(b"not gzip")
    (kafka / "items.jsonl").write_text('{"item_id":"a","title":"A"}\n{"item_id":"b","title":7}\n')
    (kafka / "no-text.jsonl").write_text('{"item_id":"a"}\n')
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    folder = kafka / "var" / "catalogue"
    assert not folder.exists() or Catalogue.open(folder).revision == 0


def test_a_catalogue_is_loaded_shown_and_delisted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "items.csv").write_text("item_id,title,categories,price\n1,Tea,hot|drinks,3\n2,Pen,,\n")
    code, out, _ = call(capsys, "catalogue", "load", "items.csv", "--json")
    assert (code, facts_of(out)["added"], facts_of(out)["listed"]) == (0, 2, 2)
    code, out, _ = call(capsys, "catalogue", "show", "1", "--json")
    assert facts_of(out) == {
        "item_id": "1", "title": "Tea", "text": "", "categories": ["hot", "drinks"],
        "attributes": {"price": "3"}, "listed": True,
    }  # fmt: skip
    code, out, err = call(capsys, "catalogue", "delist", "1", "9")
    assert (code, err) == (2, "align3gr: item 9 is not in the catalogue; nothing was delisted\n")
    code, out, _ = call(capsys, "catalogue", "delist", "1", "--json")
    assert (code, facts_of(out)["listed"]) == (0, 1)
    assert Catalogue.open(home / "var" / "catalogue").items()["item_id"].to_pylist() == ["2"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"])
def test_every_catalogue_format_says_the_same(
    home: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = home / f"items{ending}"
    if ending == ".parquet":
        columns = {"item_id": ["1"], "title": ["Tea"], "text": ["green"], "categories": [["a", "b"]]}
        pq.write_table(pa.table({**columns, "brand": ["X"], "listed": [False]}), file)
    else:
        text = (
            "item_id,title,text,categories,brand,listed\n1,Tea,green,a|b,X,false\n" if ".csv" in ending
            else '{"item_id":1,"title":"Tea","text":"green","categories":["a","b"],'
            '"brand":"X","listed":false}\n'
        )  # fmt: skip
        raw = text.encode()
        file.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    code, _, _ = call(capsys, "catalogue", "load", file)
    assert code == 0
    item = Catalogue.open(home / "var" / "catalogue").show("1")
    assert (item.title, item.text, item.categories) == ("Tea", "green", ("a", "b"))
    assert (item.attributes, item.listed) == ({"brand": "X"}, False)
