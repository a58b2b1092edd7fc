"""Filtering, splitting and pacing a dataset."""

import gzip
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import Interaction, decode_interaction
from ingest.importers import EVENTS_SCHEMA, interactions
from ingest.replay import k_core, leave_out, replay, write_held_out

START = datetime(2020, 1, 1, tzinfo=UTC)
pairs = st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz")), max_size=60)


def table(rows: list[tuple[str, str]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "user_id": user,
                "item_id": item,
                "kind": "like",
                "occurred_at": START + timedelta(seconds=10 * n),
            }
            for n, (user, item) in enumerate(rows)
        ],
        schema=EVENTS_SCHEMA,
    )


def users_and_items(events: pa.Table) -> list[tuple[str, str]]:
    return list(zip(events["user_id"].to_pylist(), events["item_id"].to_pylist(), strict=True))


@given(pairs, st.integers(1, 5))
def test_the_k_core_is_the_largest_part_in_which_everybody_has_k(rows: list[tuple[str, str]], k: int) -> None:
    kept = rows
    while True:
        users, items = Counter(u for u, _ in kept), Counter(i for _, i in kept)
        fewer = [(u, i) for u, i in kept if users[u] >= k and items[i] >= k]
        if len(fewer) == len(kept):
            break
        kept = fewer
    assert users_and_items(k_core(table(rows), k)) == kept


@given(pairs, st.integers(0, 3))
def test_each_users_last_events_are_kept_back(rows: list[tuple[str, str]], n: int) -> None:
    split = leave_out(table(rows), n)
    for user in {u for u, _ in rows}:
        of_user = [row for row in rows if row[0] == user]
        kept_back = of_user[-n:] if n and len(of_user) > n else []
        assert [row for row in users_and_items(split.held_out) if row[0] == user] == kept_back
        replayed = [row for row in users_and_items(split.replayed) if row[0] == user]
        assert replayed + kept_back == of_user
    times = split.replayed["occurred_at"].to_pylist()
    assert times == sorted(times)


@pytest.mark.parametrize("name", ["held.jsonl", "held.jsonl.gz"])
def test_held_out_events_are_written_as_they_would_be_sent(tmp_path: Path, name: str) -> None:
    events = table([("a", "v"), ("b", "w")])
    assert write_held_out(tmp_path / name, events, "test") == 2
    raw = (tmp_path / name).read_bytes()
    raw = gzip.decompress(raw) if name.endswith(".gz") else raw
    read = [decode_interaction(line, now=START + timedelta(days=1)) for line in raw.splitlines()]
    assert read == list(interactions(events, "test"))


class Recorder:
    """A sender that notes when each event was sent on a clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.sent: list[tuple[float, Interaction]] = []

    def send(self, interaction: Interaction) -> None:
        self.sent.append((self.now, interaction))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_time_scale_keeps_the_distances_and_the_order() -> None:
    events = list(interactions(table([("a", "v")] * 4), "test"))
    recorder = Recorder()
    assert replay(events, recorder, speed=5, clock=lambda: recorder.now, sleep=recorder.sleep) == 4
    assert [at for at, _ in recorder.sent] == pytest.approx([100, 102, 104, 106])
    assert [event for _, event in recorder.sent] == events


def test_full_speed_never_sleeps_and_tells_its_progress() -> None:
    events = list(interactions(table([("a", "v")] * 2500), "test"))
    recorder, told = Recorder(), list[int]()
    assert replay(events, recorder, progress=told.append, sleep=recorder.sleep) == 2500
    assert recorder.now == 100.0
    assert told == [1000, 2000, 2500]
