"""A disk that is full: said in one line, nothing half written that the next run trips over."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.interactions import encode_interaction
from ingest.settings import KafkaSettings
from tests.bad_input.place import Place
from tests.brokers import interaction

FREE = 36_000
"""Bytes that are left: a small file, but no table, dataset or model."""


@pytest.fixture
def full(place: Place) -> Iterator[Place]:
    """``place`` on a file system of its own without room; skipped where none can be mounted."""
    kept = place.folder / "kept"
    place.home.rename(kept)
    place.home.mkdir()
    size = f"size={(_bytes(kept) >> 20) + 3}m"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place.home)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        shutil.copytree(kept, place.home, dirs_exist_ok=True)
        (place.home / "ballast").write_bytes(bytes(_free(place.home) - FREE))
        yield place
    finally:
        subprocess.run(["umount", str(place.home)], check=True)


def _bytes(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def _free(folder: Path) -> int:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize


LEFT_BY = {
    "round": [r"rounds(/.*)?", "datasets", r"quality(/.*)?"],
    "tokenize": [],
    "sft": [r"sft(/.*)?"],
    "catalogue": [],
}
"""What a command may leave for the next run to take up or to replace."""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["catalogue", "load", "items.jsonl"], "nothing of this load was written"),
        (["round"], "free disk space"),
        (["tokenize"], "no space is left on the disk"),
        (["sft"], "no space is left on the disk"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    full: Place, arguments: list[str], says: str
) -> None:
    full.file("items.jsonl", "".join(f'{{"item_id":"new-{n}","title":"{n:0200}"}}\n' for n in range(2000)))
    full.set(TRAINER__SFT__BACKBONE="demo", TRAINER__SFT__EPOCHS=1, TRAINER__TOKENIZATION__STEPS=2)
    left = LEFT_BY.get(arguments[0], [])
    before, files = full.counts(), full.files(but=left)
    full.in_fork(*arguments).refused(1, says)
    after = full.counts()
    assert {
        name: after[name] for name in ("log", "catalogue", "datasets", "policies", "ledger", "codec")
    } == {name: before[name] for name in ("log", "catalogue", "datasets", "policies", "ledger", "codec")}
    assert full.files(but=left) == files


def test_ingest_on_a_full_disk_lands_everything_once_there_is_room(
    full: Place, embedded_kafka: KafkaSettings
) -> None:
    full.use(embedded_kafka)
    full.file("events.jsonl", b"".join(encode_interaction(interaction(n)) + b"\n" for n in range(500)))
    assert full.in_fork("produce", "events.jsonl").code == 0
    before, files = full.counts(), full.files()
    full.in_fork("ingest", "--until-caught-up").refused(1, "No space left", "nothing was lost")
    assert (full.counts(), full.files()) == (before, files)
    (full.home / "ballast").unlink()
    assert full.in_fork("ingest", "--until-caught-up").code == 0
    assert full.counts() == before | {"log": before["log"] + 500}


def test_a_round_goes_on_once_there_is_room(full: Place) -> None:
    before = full.counts()
    full.in_fork("round").refused(1, "free disk space")
    (full.home / "ballast").unlink()
    done = full.in_fork("round", "--resume", "last")
    assert (done.code, done.err) == (0, "")
    assert full.counts() | {"ledger": 0} == before | {"datasets": 1, "policies": 2, "rounds": 1, "ledger": 0}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["catalogue", "round"])
def test_a_limit_on_file_sizes_is_met_like_a_full_disk(place: Place, command: str) -> None:
    """What an account that is no root can meet: a quota by file."""
    import resource

    place.file("items.jsonl", "".join(f'{{"item_id":"new-{n}","title":"{n:0200}"}}\n' for n in range(2000)))
    arguments = {"catalogue": ["catalogue", "load", "items.jsonl"], "round": ["round"]}[command]
    before = place.counts()
    limit = (10_000, 10_000)
    done = place.run(*arguments, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    done.refused(1, "File too large" if command == "catalogue" else "file sizes")
    assert place.counts() | {"rounds": 0, "datasets": 0} == before
