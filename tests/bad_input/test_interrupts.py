"""Ctrl-C in the middle: exit code 130, one line, and the same command again does the whole work."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ingest.settings import KafkaSettings
from ingest.topics import reach
from tests.bad_input.place import Done, Place
from tests.brokers import raw_rows

STOPPED = Done(130, "", "align3gr: stopped\n")


def interrupted(place: Place, *arguments: str, once: Callable[[], bool]) -> Done:
    """Run until ``once``, then press Ctrl-C."""
    command = place.start(*arguments)
    deadline = time.monotonic() + 120
    while not once():
        assert command.alive, command.end()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return command.interrupt().end()


def holds(folder: Path, pattern: str, rows: int = 1) -> Callable[[], bool]:
    """Whether a file that fits has at least ``rows`` lines."""
    return lambda: any(len(file.read_bytes().splitlines()) >= rows for file in folder.glob(pattern))


def test_a_round_is_stopped_and_resumed(place: Place) -> None:
    settings = place.folder / "align3gr.yaml"
    settings.write_text(settings.read_text().replace("epochs: 2", "epochs: 10"))
    before = place.counts()
    done = interrupted(place, "round", once=holds(place.home, "rounds/r0001/easy/metrics.jsonl", 3))
    assert done == STOPPED
    assert place.counts() == before | {"datasets": 1, "rounds": 1}
    done = place.in_fork("round", "--resume", "last", "--json")
    assert (done.code, done.err) == (0, "")
    counts = place.counts()
    assert (counts["datasets"], counts["rounds"], counts["policies"]) == (1, 1, 2)
    assert not list((place.home / "policies").glob(".*"))


def test_sft_is_stopped_and_goes_on(place: Place) -> None:
    place.set(TRAINER__SFT__BACKBONE="demo", TRAINER__SFT__EPOCHS=5)
    before = place.counts()
    done = interrupted(place, "sft", once=holds(place.home, "sft/*/state.json"))
    assert done == STOPPED
    assert place.counts() | {"sft": 0} == before
    done = place.in_fork("sft", "--json")
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert "v2 is registered" in done.err
    assert place.counts() == before | {"policies": 2}
    assert not list((place.home / "sft").iterdir())


def test_a_replay_is_stopped_and_sent_again(empty: Place, embedded_kafka: KafkaSettings) -> None:
    empty.use(embedded_kafka)
    rows = [f"{n % 20},{n},5,{1_000_000_000 + 10 * n}\n" for n in range(400)]
    empty.file("ratings.csv", "userId,movieId,rating,timestamp\n" + "".join(rows))

    def sent() -> int:
        return sum(at.end for at in reach(embedded_kafka).values())

    replay = ["replay", "movielens", "ratings.csv", "--no-catalogue"]
    assert interrupted(empty, *replay, "--speed", "100", once=lambda: sent() > 0) == STOPPED
    part = sent()
    assert 0 < part < 400
    done = empty.in_fork(*replay)
    assert (done.code, done.err) == (0, "")
    assert sent() == part + 400
    assert empty.in_fork("ingest", "--until-caught-up").code == 0
    landed = raw_rows(empty.home / "log")
    assert (len(landed), len({event_id for event_id, _, _ in landed})) == (part + 400, 400)


@pytest.mark.parametrize(
    "arguments", [["ingest"], ["rate"], ["serve", "--port", "0"], ["features", "follow"]], ids=" ".join
)
def test_what_runs_for_ever_ends_in_order(
    place: Place, embedded_kafka: KafkaSettings, arguments: list[str]
) -> None:
    place.use(embedded_kafka)
    command = place.start(*arguments)
    deadline = time.monotonic() + 120
    while not (command.err.exists() and command.err.read_text().endswith("\n")):
        assert command.alive, command.end()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    done = command.interrupt().end()
    assert done.code in (0, 130), done
    first, *rest = done.err.splitlines()
    assert first
    assert rest in ([], ["align3gr: stopped"])
