"""A forget for nobody, a restore onto a live store, manifests that are gone, a clock that went backwards."""

import json
import shutil
from pathlib import Path

import pytest

from tests.bad_input.place import Place

LOCKS = ["rounds", r"rounds/lease", r"upkeep\.lock", r"online(/.*)?"]
"""Lock files stay; opening the online store writes its registry."""


def test_a_forget_for_nobody_changes_nothing(place: Place) -> None:
    before = place.files(but=LOCKS)
    place.in_fork("forget", "stranger", "--no-broker").refused(
        2, "'stranger'", "check the id", "nothing was changed"
    )
    assert place.files(but=LOCKS) == before


def test_a_forget_without_a_broker_says_what_is_left_to_do(place: Place) -> None:
    place.set(KAFKA__BOOTSTRAP_SERVERS="127.0.0.1:9", KAFKA__CONNECT_TIMEOUT_S=0.5)
    done = place.in_fork("forget", "user-001", "--json")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert "dead letters were not looked through" in done.err
    assert json.loads(done.out)["rows"] > 0
    done = place.in_fork("forget", "user-001", "--no-broker")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("damage", ["{", '{"key": "00", "tombstones": 7}'])
def test_tombstones_that_cannot_be_read_stop_everything_that_could_bring_back(
    place: Place, damage: str
) -> None:
    (place.home / "log" / "_forgotten").mkdir()
    (place.home / "log" / "_forgotten" / "tombstones.json").write_text(damage)
    before = place.counts()
    place.in_fork("forget", "user-001", "--no-broker").refused(1, "tombstones", "restore the file")
    assert place.counts() == before


def test_a_restore_onto_a_live_store_is_refused(place: Place) -> None:
    assert place.in_fork("backup", "copy").code == 0
    before = place.files(but=LOCKS)
    place.in_fork("restore", "copy").refused(2, "holds a store", "empty home", "nothing was changed")
    assert place.files(but=LOCKS) == before


def test_a_backup_goes_to_a_new_folder_and_a_restore_comes_from_one(place: Place) -> None:
    place.file("taken", "")
    place.in_fork("backup", "taken").refused(2, "taken", "name a new folder")
    place.in_fork("backup", "var/copy").refused(2, "outside")
    shutil.rmtree(place.home)
    place.in_fork("backup", "copy").refused(2, "no feedback log")
    place.in_fork("restore", "nowhere").refused(2, "nowhere is no backup", "backup.json")
    assert not place.home.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["round", "--from-manifest", "r0007"], ["no round r0007", "none yet"]),
        (["round", "--from-manifest", "r0001", "--seed", "3"], ["--from-manifest", "no --seed"]),
        (["policy", "compare", "v1", "v1"], ["one policy"]),
        (["policy", "compare", "v1", "v7"], ["v7 is not registered"]),
        (["policy", "compare", "v1"], ["B"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_not_there_is_named(place: Place, arguments: list[str], says: list[str]) -> None:
    before = place.counts()
    place.in_fork(*arguments).refused(2, *says)
    assert place.counts() == before


def test_a_manifest_whose_version_is_gone_and_a_clock_that_went_backwards(place: Place) -> None:
    assert place.in_fork("round", "--json").code == 0
    state = place.home / "rounds" / "r0001" / "state.json"
    facts = json.loads(state.read_text())
    for file in (place.home / "log").glob("landed_on=*/*.parquet"):
        _rename_away(file)
    place.in_fork("round", "--from-manifest", "r0001").refused(
        2, f"version {facts['log_version']} of the feedback log", "restore a backup"
    )
    state.write_text(json.dumps(facts | {"started_at": "2199-01-01T00:00:00+00:00"}))
    place.in_fork("round").refused(2, "the clock says", "began at 2199-01-01", "set this machine's clock")


def _rename_away(file: Path) -> None:
    file.rename(file.with_suffix(".gone"))
