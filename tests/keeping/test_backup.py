"""Backups: consistent beside a writer, checked before a restore, never put over a live store."""

import json
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from align3gr.backup import BadBackup, LiveStore, NoPlace, back_up, restore
from align3gr.forgetting import forget
from features.datasets import PreferenceDataset
from features.duck import connect, view_of
from features.log import FeedbackLog
from features.settings import FeatureSettings, UpkeepSettings
from features.upkeep import keep_up
from policies.ledger import PromotionLedger
from policies.policy import Policy
from tests.keeping.conftest import built, settings_of
from tests.keeping.stored_bytes import files_with
from tests.trainer.round_world import add_feedback
from trainer.round_state import RoundsTable

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def now() -> datetime:
    return NOW


def rows_of(home: Path, version: int | None = None) -> list[tuple[str, int]]:
    with connect(FeatureSettings()) as con:
        view_of(con, "log", FeedbackLog.open(home / "log", create=False).snapshot(version))
        return con.execute("select user_id, kafka_offset from log order by 2").fetchall()


def test_a_backup_beside_a_writer_is_one_version_and_comes_back_whole(home: Path, tmp_path: Path) -> None:
    stop, written = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            written.append(add_feedback(home, seed=2 + len(written) % 20, users=3, slates=1))

    writer = threading.Thread(target=write)
    writer.start()
    while not written:
        stop.wait(0.01)
    made = back_up(settings_of(home), tmp_path / "backup", clock=now)
    stop.set()
    writer.join()
    assert made.log_version <= written[-1]
    back = tmp_path / "back"
    restored, again = restore(settings_of(back), tmp_path / "backup", clock=now)
    assert (restored, again) == (made, [])
    assert rows_of(back) == rows_of(home, made.log_version)
    assert FeedbackLog.open(back / "log").version == made.log_version
    assert [one.as_dict() for one in PromotionLedger(back / "ledger").history()] == [
        one.as_dict() for one in PromotionLedger(home / "ledger").history()
    ]
    assert Policy.load(back / "policies" / "v2").version == "v2"
    assert RoundsTable(back / "rounds").read("r0001") == RoundsTable(home / "rounds").read("r0001")
    # The version that the manifest names came along, and the log goes on behind its last offset.
    manifest = PreferenceDataset.open(next((back / "datasets").glob("[!.]*"))).manifest
    named = FeedbackLog.open(back / "log").snapshot(manifest.log_version)
    assert built(named, tmp_path / "again").dataset_id == manifest.dataset_id
    add_feedback(back, seed=25, users=1, slates=1)
    offsets = [offset for _, offset in rows_of(back)]
    assert len(offsets) == len(set(offsets))


def test_a_compacted_log_is_backed_up_with_the_versions_that_manifests_name(
    home: Path, tmp_path: Path
) -> None:
    eager = UpkeepSettings(compact_from_files=2, retention_hours=0)
    keep_up(FeedbackLog.open(home / "log"), home / "datasets", home / "upkeep.lock", eager)
    (manifest,) = (PreferenceDataset.open(path).manifest for path in (home / "datasets").glob("[!.]*"))
    back_up(settings_of(home), tmp_path / "backup", clock=now)
    restore(settings_of(tmp_path / "back"), tmp_path / "backup", clock=now)
    assert rows_of(tmp_path / "back", manifest.log_version) == rows_of(home, manifest.log_version)


def test_a_live_store_is_never_written_over(home: Path, tmp_path: Path) -> None:
    back_up(settings_of(home), tmp_path / "backup", clock=now)
    before = sorted(home.rglob("*"))
    with pytest.raises(LiveStore, match="restore into an empty home"):
        restore(settings_of(home), tmp_path / "backup", clock=now)
    assert sorted(home.rglob("*")) == before


def test_a_restore_that_was_killed_is_run_again(home: Path, tmp_path: Path) -> None:
    back_up(settings_of(home), tmp_path / "backup", clock=now)
    back = tmp_path / "back"
    (back / "log" / "_delta_log").mkdir(parents=True)
    (back / "log" / "_delta_log" / f"{0:020d}.json").write_text("half")
    (back / ".restoring").write_text("it began\n")
    restore(settings_of(back), tmp_path / "backup", clock=now)
    assert rows_of(back) == rows_of(home)
    assert not (back / ".restoring").exists()


@pytest.mark.parametrize("damage", ["changed", "lacks", "outside", "no manifest", "torn manifest"])
def test_a_damaged_backup_is_refused_before_anything_is_written(
    home: Path, tmp_path: Path, damage: str
) -> None:
    source, back = tmp_path / "backup", tmp_path / "back"
    back_up(settings_of(home), source, clock=now)
    file = next((source / "policies").rglob("*.safetensors"))
    if damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "lacks":
        file.unlink()
    elif damage == "outside":
        raw = json.loads((source / "backup.json").read_text())
        raw["files"]["../else"] = "0"
        (source / "backup.json").write_text(json.dumps(raw))
    elif damage == "no manifest":
        (source / "backup.json").unlink()
    else:
        (source / "backup.json").write_text("{")
    with pytest.raises(BadBackup):
        restore(settings_of(back), source, clock=now)
    assert not back.exists()


def test_a_backup_needs_a_new_folder_outside_of_home(home: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(NoPlace, match="not empty"):
        back_up(settings_of(home), tmp_path / "full", clock=now)
    with pytest.raises(NoPlace, match="outside"):
        back_up(settings_of(home), home / "backup", clock=now)
    (tmp_path / "empty").mkdir()
    back_up(settings_of(home), tmp_path / "empty", clock=now)
    assert (tmp_path / "empty" / "backup.json").exists()


def test_an_older_backup_does_not_bring_back_who_was_forgotten_since(home: Path, tmp_path: Path) -> None:
    user = "user-007"
    back_up(settings_of(home), tmp_path / "backup", clock=now)
    forget(settings_of(home), user, clock=now, broker=False)
    tombstones = shutil.copy(home / "log" / "_forgotten" / "tombstones.json", tmp_path / "tombstones.json")
    back = tmp_path / "back"
    _, again = restore(settings_of(back), tmp_path / "backup", tombstones=Path(tombstones), clock=now)
    assert again == [user]
    assert files_with(back, user) == []
    assert {who for who, _ in rows_of(back)} == {f"user-{number:03d}" for number in range(48)} - {user}
