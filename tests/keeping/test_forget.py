"""A forgotten person is in no byte of the store, does not come back, and everybody else is as before."""

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align3gr.forgetting import NobodyToForget, forget
from features.batch import InteractionBatch, Record
from features.datasets import PreferenceDataset
from features.duck import connect, view_of
from features.forgetting import without_user
from features.forgotten_datasets import successor
from features.interactions import Interaction, Kind, encode_interaction
from features.log import LOG_SCHEMA, FeedbackLog, LogConflict, offsets_app, watermark_app
from features.online.contexts import OnlineFeatures
from features.online.follow import follow
from features.online.repository import OnlineUnavailable, exclusive
from features.settings import FeatureSettings, UpkeepSettings
from features.split import role_of
from features.tombstones import TombstoneWatch, bury, read_tombstones
from features.upkeep import keep_up
from tests.keeping.conftest import built, settings_of
from tests.keeping.stored_bytes import files_with, pages
from tests.trainer.round_world import LATER, POLICIES, add_feedback, workplace
from trainer.judging import read_gate_input
from trainer.lease import Lease, RoundRunning
from trainer.round_state import RoundsTable

NOW = datetime(2026, 5, 1, tzinfo=UTC)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["align3gr.forgetting", "tests.keeping.conftest"])


def of_role(role: str) -> str:
    users = (f"user-{number:03d}" for number in range(48))
    return next(user for user in users if role_of(user, POLICIES.gate.share, 0.0) == role)


def forgotten(home: Path, user: str):  # type: ignore[no-untyped-def]
    return forget(settings_of(home), user, clock=lambda: NOW, broker=False)


def dataset_of(home: Path) -> str:
    state = RoundsTable(home / "rounds").read("r0001")
    return str(state.steps["dataset"]["dataset_id"])


def log_without(home: Path, user: str, target: Path, version: int) -> FeedbackLog:
    """A log in which the user never was: the rows of everybody else at ``version``."""
    with connect(FeatureSettings()) as con:
        view_of(con, "log", FeedbackLog.open(home / "log").snapshot(version))
        rows = con.execute("select * from log where user_id <> $user", {"user": user}).to_arrow_table()
    log, app = FeedbackLog.open(target), offsets_app("test", "interactions", 0)
    log.transaction_version(app)
    mark = int(LATER.timestamp() * 1000)
    log.append(rows.cast(LOG_SCHEMA), {app: 10**6, watermark_app("test", "interactions", 0): mark})
    return log


@pytest.mark.parametrize("role", ["train", "gate"])
def test_nothing_of_a_forgotten_person_is_in_any_byte_of_the_store(
    home: Path, tmp_path: Path, role: str
) -> None:
    user, others = of_role(role), "user-040"
    was = dataset_of(home)
    manifest = PreferenceDataset.open(home / "datasets" / was).manifest
    never = log_without(home, user, tmp_path / "never", manifest.log_version)
    predicted = built(never.snapshot(), tmp_path / "predicted")
    before = files_with(home, user)
    assert {file.split("/")[0] for file in before} >= {"log", "datasets", "online"}
    assert any("gate_input" in file for file in before) == (role == "gate")

    done = forgotten(home, user)
    keep_up(
        FeedbackLog.open(home / "log"),
        home / "datasets",
        home / "upkeep.lock",
        UpkeepSettings(compact_from_files=2, retention_hours=0),
        now=NOW,
    )

    assert files_with(home, user) == []
    assert len(files_with(home, others)) >= 3
    assert done.rows > 0
    assert not done.left
    assert [(one.was, one.now) for one in done.datasets] == [(was, predicted.dataset_id)]
    assert successor(home / "datasets", was) == predicted.dataset_id
    survivor = PreferenceDataset.open(home / "datasets" / predicted.dataset_id)
    survivor.verify()
    for stage, counts in predicted.manifest.stages.items():
        survived = survivor.manifest.stages[stage]
        assert (survived.samples, survived.by_role) == (counts.samples, counts.by_role)
    # The version that the manifest names is still there, without them: built again it gives the same.
    named = FeedbackLog.open(home / "log").snapshot(manifest.log_version)
    assert built(named, tmp_path / "again").dataset_id == predicted.dataset_id
    # The tiny v1 has no date: nobody knows what it was trained on. v2 names its dataset.
    assert [(one.version, one.how) for one in done.learned] == [("v2", "dataset")]


def test_the_others_rows_and_figures_are_as_they_were(home: Path) -> None:
    user = of_role("gate")
    given = read_gate_input(home / "rounds" / "r0001" / "gate_input.json")
    assert user in given.users
    at = given.users.index(user)
    total = FeedbackLog.open(home / "log").snapshot().files
    count = sum(pq.read_metadata(file).num_rows for file in total)
    done = forgotten(home, user)
    files = FeedbackLog.open(home / "log").snapshot().files
    assert sum(pq.read_metadata(file).num_rows for file in files) == count - done.rows
    after = read_gate_input(home / "rounds" / "r0001" / "gate_input.json")
    assert after.users == given.users[:at] + given.users[at + 1 :]
    for metric, values in given.candidate.per_user.items():
        kept = [value for place, value in enumerate(values) if place != at]
        assert after.candidate.per_user[metric].tolist() == pytest.approx(kept, nan_ok=True, abs=0)
    assert done.rounds == ["r0001"]
    assert "forgotten" in (home / "rounds" / "r0001" / "forgotten.json").read_text()


def test_online_the_person_is_a_stranger_and_stays_one(home: Path) -> None:
    user = of_role("train")
    reader = OnlineFeatures.open(home / "online", FeatureSettings().online)
    assert reader.contexts([user])[0].known
    forgotten(home, user)
    add_feedback(home, seed=7, users=1, slates=1)  # user-000, landed around the tombstones of ingest
    follow(home / "log", home / "online", FeatureSettings(), once=True)
    fresh = OnlineFeatures.open(home / "online", FeatureSettings().online)
    assert not fresh.contexts([user])[0].known
    assert fresh.contexts(["user-040"])[0].known


def test_a_follower_at_work_is_waited_for_until_it_knows(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = of_role("train")
    monkeypatch.setattr("features.online.forgetting._WAIT_S", 0.3)
    with exclusive(home / "online" / "follow.lock"), pytest.raises(OnlineUnavailable, match="catch up"):
        forgotten(home, user)
    forgotten(home, user)  # it has stopped: a repetition finishes
    assert files_with(home, user) == []


def test_a_replay_does_not_bring_them_back(home: Path) -> None:
    user = of_role("train")
    forgotten(home, user)
    watch = TombstoneWatch(home / "log")
    buried = watch.current()
    assert buried is not None
    batch = InteractionBatch.of(FeatureSettings())
    records = [
        Record(encode_interaction(event(number, who)), 0, number, 0)
        for number, who in enumerate([user, "user-040", user, "new"])
    ]
    assert not batch.add(records, now=LATER)
    assert buried.without(batch.table(LATER))["user_id"].to_pylist() == ["user-040", "new"]
    assert buried.names(json.dumps({"user_id": user, "kind": "?"}).encode())
    assert not buried.names(b'{"user_id": "new"}')
    assert not buried.names(b"no json")
    assert user not in (home / "log" / "_forgotten" / "tombstones.json").read_text()


def test_an_append_that_was_under_way_cannot_land_their_rows(home: Path) -> None:
    user = of_role("train")
    writer = FeedbackLog.open(home / "log")
    app = offsets_app("test", "interactions", 0)
    last = writer.transaction_version(app) or 0
    batch = InteractionBatch.of(FeatureSettings())
    batch.add([Record(encode_interaction(event(1, user)), 0, last + 1, 0)], now=LATER)
    forgotten(home, user)
    with pytest.raises(LogConflict):
        writer.append(batch.table(LATER), {app: last + 1})


def event(number: int, user: str) -> Interaction:
    return Interaction(
        event_id=f"again-{number}", user_id=user, item_id="item-001", kind=Kind.LIKE, occurred_at=LATER
    )


def test_a_second_run_changes_nothing_and_says_the_same(home: Path) -> None:
    user = of_role("gate")
    first = forgotten(home, user)
    state = everything(home)
    second = forgotten(home, user)
    assert (second.rows, second.files, second.rounds) == (0, 0, [])
    assert second.datasets == first.datasets
    assert second.learned == first.learned
    assert everything(home) == state


def everything(home: Path) -> dict[str, bytes]:
    """Datasets, rounds and tombstones, byte for byte, and what the log holds."""
    files = [
        file
        for folder in ("datasets", "rounds", "log/_forgotten")
        for file in sorted((home / folder).rglob("*"))
        if file.is_file() and file.name != "lease" and "journals" not in file.parts
    ]
    return {str(file.relative_to(home)): file.read_bytes() for file in files}


def _forget(home: str, user: str) -> None:
    forgotten(Path(home), user)


Point = Callable[[Path], bool]
POINTS: dict[str, Point] = {
    "tombstone": lambda home: (home / "log/_forgotten/tombstones.json").exists(),
    "journal": lambda home: any((home / "log/_forgotten/journals").glob("*.json")),
    "rewriting": lambda home: any((home / "log").glob("landed_on=*/*.zstd.parquet")),
    "replaced": lambda home: any((home / "log/_forgotten/files").rglob("*.parquet")),
    "datasets": lambda home: any((home / "datasets").glob(".building-*")),
    "noted": lambda home: (home / "datasets/.forgotten.json").exists(),
    "rounds": lambda home: (home / "rounds/r0001/forgotten.json").exists(),
}


FAST = {"replaced", "noted"}


@pytest.mark.parametrize(
    "point", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in POINTS]
)
def test_killed_anywhere_and_run_again_it_ends_the_same(home: Path, point: str) -> None:
    user = of_role("gate")
    process = FORKS.Process(target=_forget, args=(str(home), user))
    process.start()
    while process.is_alive() and not POINTS[point](home):
        time.sleep(0.0003)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    done = forgotten(home, user)
    assert files_with(home, user) == []
    assert len(done.datasets) == 1
    assert done.datasets[0].now is not None
    assert [one.version for one in done.learned] == ["v2"]
    buried = read_tombstones(home / "log")
    assert buried is not None
    assert len(buried.marks) == 1
    add_feedback(home, seed=3, users=2, slates=1)  # the log takes appends again


def test_an_unfinished_round_that_learned_from_them_ends_as_failed(home: Path) -> None:
    user = of_role("train")
    place = workplace(home)
    state = place.rounds.read("r0001")
    from dataclasses import replace

    place.rounds.write(replace(state, status="running", outcome=None))
    forgotten(home, user)
    state = place.rounds.read("r0001")
    assert state.status == "failed"
    assert "forgotten" in (state.message or "")


def test_nobody_is_forgotten_under_a_name_that_no_store_knows(home: Path) -> None:
    before = everything(home)
    with pytest.raises(NobodyToForget, match="check the id; nothing was changed"):
        forgotten(home, "stranger")
    assert everything(home) == before
    assert read_tombstones(home / "log") is None


def test_an_item_with_the_id_of_the_user_stays(home: Path) -> None:
    record = home / "rounds" / "r0001" / "eligible.json"
    record.write_text('["user-001", "item-001"]')
    done = forgotten(home, "user-001")
    assert done.left == []
    assert record.read_text() == '["user-001", "item-001"]'
    (home / "rounds" / "r0001" / "cases.jsonl").write_text('{"user_id": "user-001"}\n')
    assert forgotten(home, "user-001").left == ["rounds/r0001/cases.jsonl"]


def test_a_running_round_is_waited_for(home: Path) -> None:
    with Lease(home / "rounds").held(), pytest.raises(RoundRunning):
        forgotten(home, "user-001")


def test_dictionary_pages_are_written_without_the_person(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    users = pa.array(["gone", "stays"] * 50).dictionary_encode()
    pq.write_table(pa.table({"user_id": users, "n": range(100)}), file)
    assert any(b"gone" in page for page in pages(file, file.read_bytes()))
    assert without_user(file, "gone") == 50
    assert files_with(tmp_path, "gone") == []
    assert pq.read_table(file)["n"].to_pylist() == list(range(1, 100, 2))


def test_tombstones_cost_one_look_a_batch_until_there_are_some(tmp_path: Path) -> None:
    watch = TombstoneWatch(tmp_path)
    assert watch.current() is None
    bury(tmp_path, "ann", NOW)
    known = watch.current()
    assert known is not None
    assert known.holds("ann")
    assert watch.current() is known
    bury(tmp_path, "bob", NOW)
    assert watch.current() is not known


def test_deleted_rows_leave_the_sqlite_file(home: Path) -> None:
    user = of_role("train")
    forgotten(home, user)
    assert user.encode() not in (home / "online" / "online.db").read_bytes()
    with sqlite3.connect(home / "online" / "online.db") as con:
        assert con.execute("pragma integrity_check").fetchone() == ("ok",)
