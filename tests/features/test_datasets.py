import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.datasets import SAMPLE_SCHEMA, EmptyLog, PreferenceDataset, TooFewLikes
from features.errors import FeaturesError
from features.manifest import DatasetMissing, named_versions
from features.rows_hash import RowsHash
from features.settings import DatasetSettings, FeatureSettings
from features.split import role_of
from tests.features.drawn_feedback import draw_rows, draw_watermark
from tests.features.feedback_oracle import EPOCH, row, samples, write_snapshot

LATER = EPOCH + timedelta(days=1)
BUILT = datetime(2026, 2, 1, tzinfo=UTC)
WITHOUT = ("sample_id", "role")


def of(*, length=3, look_back=5, rejected=2, threads=1, **dataset):
    chosen = {"min_samples": 1, "max_samples_per_user": 4, "rows_per_shard": 500} | dataset
    return FeatureSettings(
        history_length=length,
        history_look_back=look_back,
        max_rejected=rejected,
        duck={"threads": threads},
        dataset=DatasetSettings(**chosen),
    )


SMALL = of()


def build(folder, rows, watermark=LATER, chosen=SMALL, **options):
    snapshot = write_snapshot(folder / "log", rows, watermark, version=options.pop("version", 0))
    return PreferenceDataset.build(snapshot, chosen, folder / "datasets", clock=lambda: BUILT, **options)


def rows_of(dataset, stage):
    table = dataset.stage(stage)
    assert table.schema == SAMPLE_SCHEMA
    return [{k: v for k, v in r.items() if k not in WITHOUT} for r in table.to_pylist()]


def built_and_defined(folder, rows, watermark, chosen, since=None):
    """A dataset's stages and the oracle's: samples, likes without a negative, likes in all; {} for none."""
    oracle = {
        stage: samples(rows, chosen, watermark, level, since) for stage, level in (("easy", -1), ("hard", 0))
    }
    try:
        dataset = build(folder, rows, watermark, chosen, since=since)
    except (TooFewLikes, EmptyLog):
        return {}, {stage: found for stage, (found, _) in oracle.items() if found}
    likes, built = dataset.manifest.likes, {}
    for stage, counts in dataset.manifest.stages.items():
        accounted = sum(counts.refused.values()) + counts.samples
        built[stage] = (rows_of(dataset, stage), counts.samples, counts.refused["no_negative"], accounted)
    return built, {
        stage: (found, len(found), no_negative, likes) for stage, (found, no_negative) in oracle.items()
    }


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.randoms(use_true_random=False))
def test_samples_are_their_definition_for_whatever_arrives_in_whatever_order(tmp_path, pick):
    chosen = of(length=pick.randint(1, 4), look_back=pick.randint(1, 6), rejected=pick.randint(1, 4))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # an equal dataset that is there already would be kept
    rows, watermark = draw_rows(pick, users=5, most=30), draw_watermark(pick)
    built, defined = built_and_defined(folder, rows, watermark, chosen)
    assert built == defined


@pytest.mark.parametrize(("minutes", "since"), [(60, None), (1000, None), (1000, 31)])
def test_samples_are_their_definition_for_a_crowd(tmp_path, minutes, since):
    rows = draw_rows(random.Random(minutes), users=150, most=40)
    arrived_after = None if since is None else EPOCH + timedelta(minutes=since)
    watermark = EPOCH + timedelta(minutes=minutes)
    built, defined = built_and_defined(tmp_path, rows, watermark, SMALL, arrived_after)
    assert built == defined
    assert sum(len(found) for found, *_ in built.values()) > 100


def test_impression_click_like_keeps_the_click_out_of_its_own_prompt(tmp_path):
    rows = [
        row("like", "old", at=-60, offset=0),
        row("served", "a", at=0, request_id="r", policy_version="v1", propensity=0.5, offset=1),
        row("served", "b", at=0, request_id="r", offset=2),
        row("impression", "a", at=1, request_id="r", offset=3),
        row("impression", "b", at=1, request_id="r", offset=4),
        row("click", "b", at=2, request_id="r", offset=5),
        row("click", "a", at=3, request_id="r", offset=6),
        row("like", "a", at=4, request_id="r", offset=7),
        row("dislike", "b", at=5, request_id="r", offset=8),
    ]
    dataset = build(tmp_path, rows)
    assert rows_of(dataset, "easy") == [
        {
            "user_id": "u",
            "history": ["old"],
            "chosen": "a",
            "rejected": ["b"],
            "asked_at": EPOCH,
            "request_id": "r",
            "policy_version": "v1",
            "propensity": 0.5,
        }
    ]


def test_two_clocks_hold_for_every_order_of_arrival(tmp_path):
    story = [
        row("click", "old", at=-5),
        row("served", "a", at=0, request_id="r"),
        row("impression", "b", at=1, request_id="r"),
        row("click", "a", at=2, request_id="r"),
        row("like", "a", at=3, request_id="r"),
        row("dislike", "c", at=4),
    ]
    rows = [
        event | {"user_id": f"u{n:03}", "kafka_offset": offset, "landed_at": EPOCH + timedelta(hours=3)}
        for n, arrival in enumerate(itertools.permutations(story))
        for offset, event in enumerate(arrival)
    ]
    dataset = build(tmp_path, rows)
    hard = rows_of(dataset, "hard")
    assert hard == samples(rows, SMALL, LATER, 0)[0]
    assert len(hard) == 720
    known = sum(sample["history"] == ["old"] for sample in hard)
    assert known == 360  # the old click landed before the slate was served in half of the orders
    assert all(sample["history"] in (["old"], []) for sample in hard)
    assert all(sample["rejected"] == ["b"] for sample in hard)


def test_a_neutral_of_the_same_slate_is_rejected_although_it_is_known_only_after_the_like(tmp_path):
    rows = [
        row("served", "a", at=0, request_id="r", offset=0),
        row("served", "b", at=0, request_id="r", offset=1),
        row("impression", "a", at=1, request_id="r", offset=2),
        row("like", "a", at=2, request_id="r", offset=3),
        row("impression", "b", at=3, request_id="r", offset=4),
    ]
    dataset = build(tmp_path, rows)
    assert [r["rejected"] for r in rows_of(dataset, "hard")] == [["b"]]
    early = EPOCH + timedelta(minutes=32)  # b's window is still open
    with pytest.raises(TooFewLikes):
        build(tmp_path, rows, watermark=early, version=1)


def test_an_event_that_landed_after_the_request_was_not_known_to_the_prompt(tmp_path):
    slate = [
        row("served", "a", at=10, request_id="r", offset=5),
        row("like", "a", at=12, request_id="r", offset=6),
        row("dislike", "n", at=1, offset=1),
    ]
    in_time = row("like", "h", at=5, offset=4)
    late = row("like", "h", at=5, delay=30, offset=7)
    known = rows_of(build(tmp_path, [*slate, in_time]), "easy")
    unknown = rows_of(build(tmp_path, [*slate, late], version=1), "easy")
    assert {r["chosen"]: r["history"] for r in known}["a"] == ["h"]
    assert {r["chosen"]: r["history"] for r in unknown}["a"] == []


def test_feedback_without_a_request_is_asked_for_at_the_first_event_on_the_item(tmp_path):
    rows = [
        row("rating", "h", at=0, level=1, offset=0),
        row("dislike", "n", at=1, offset=1),
        row("click", "a", at=5, offset=2),
        row("like", "x", at=6, offset=3),
        row("rating", "a", at=9, level=1, offset=4),
    ]
    found = {r["chosen"]: r for r in rows_of(build(tmp_path, rows), "easy")}
    assert found["a"]["asked_at"] == EPOCH + timedelta(minutes=5)
    assert found["a"]["history"] == ["h"]


def test_an_item_liked_by_the_cutoff_is_never_rejected(tmp_path):
    rows = [
        row("dislike", "b", at=0, offset=0),
        row("dislike", "c", at=1, offset=1),
        row("like", "a", at=2, offset=2),
        row("like", "b", at=600, offset=3),
    ]
    found = {r["chosen"]: r["rejected"] for r in rows_of(build(tmp_path, rows), "easy")}
    assert found == {"a": ["c"], "b": ["c"]}


def liked_and_disliked(users=30):
    return [
        event
        for n in range(users)
        for event in (
            row("dislike", "n", f"u{n}", at=0, offset=3 * n),
            row("like", "h", f"u{n}", at=1, offset=3 * n + 1),
            row("like", "a", f"u{n}", at=2, offset=3 * n + 2),
        )
    ]


def test_every_user_has_the_role_of_the_split(tmp_path):
    dataset = build(tmp_path, liked_and_disliked(60), gate_share=0.3, stop_share=0.2)
    roles = {r["user_id"]: r["role"] for r in dataset.stage("easy").to_pylist()}
    assert roles == {user: role_of(user, 0.3, 0.2) for user in roles}
    assert len(roles) == 60
    counted = {role: dataset.stage("easy", role).num_rows for role in ("train", "stop", "gate")}
    assert counted == dataset.manifest.stages["easy"].by_role
    assert all(counted.values())


def test_too_few_samples_to_train_on_counts_neither_gate_nor_stop_users(tmp_path):
    rows = liked_and_disliked(20)
    wanted = of(min_samples=40)
    assert build(tmp_path, rows, chosen=wanted).manifest.stages["easy"].samples == 40
    with pytest.raises(TooFewLikes, match="wait for more feedback"):
        build(tmp_path, rows, chosen=wanted, gate_share=0.5)


def test_the_same_rows_have_the_same_id_whatever_the_threads_and_shards(tmp_path):
    rows = draw_rows(random.Random(2), users=30, most=40)
    ids = {
        build(tmp_path / str(n), rows, chosen=chosen).dataset_id
        for n, chosen in enumerate([of(), of(threads=2, rows_per_shard=200), of(rows_per_shard=10_000_000)])
    }
    shuffled = random.Random(3).sample(rows, len(rows))
    assert {build(tmp_path / "shuffled", shuffled).dataset_id} == ids
    more = [*rows, row("dislike", "y", "new", offset=1), row("like", "z", "new", at=1, offset=2)]
    assert build(tmp_path / "more", more).dataset_id not in ids


def test_the_id_is_pinned(tmp_path):
    """A dataset built by an earlier version of the product, DuckDB or Arrow must be recognised."""
    assert build(tmp_path, liked_and_disliked(3)).dataset_id == "7170bdd2805c3ce7"


def test_building_again_keeps_the_dataset_that_is_there(tmp_path):
    first = build(tmp_path, liked_and_disliked())
    before = {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()}
    second = build(tmp_path, liked_and_disliked(), version=7)
    assert second.path == first.path
    assert second.manifest == first.manifest
    assert {file.name: file.stat().st_mtime_ns for file in first.path.iterdir()} == before
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == [first.dataset_id]


def test_the_manifest_says_what_was_built_from_what(tmp_path):
    rows = draw_rows(random.Random(5), users=40, most=30)
    snapshot = write_snapshot(tmp_path / "log", rows, LATER, version=3)
    chosen = of(window_s=86_400.0)
    dataset = PreferenceDataset.build(snapshot, chosen, tmp_path, clock=lambda: BUILT)
    manifest = PreferenceDataset.open(dataset.path).manifest
    assert manifest == dataset.manifest
    assert (manifest.log_version, manifest.watermark, manifest.built_at) == (3, LATER, BUILT)
    assert manifest.since == EPOCH
    assert manifest.rows == len(rows)
    assert manifest.unsigned == sum(r["signed"] is False for r in rows)
    learned = [r for r in rows if r["signed"] is not False]
    assert manifest.duplicates == len(learned) - len({(r["user_id"], r["event_id"]) for r in learned})
    assert manifest.rules_hash == chosen.levels.hash
    assert manifest.settings["history_length"] == 3
    assert named_versions(tmp_path) == {3}
    dataset.verify()


def test_sample_ids_name_one_sample_each(tmp_path):
    dataset = build(tmp_path, draw_rows(random.Random(5), users=60, most=40))
    ids = [i for stage in ("easy", "hard") for i in dataset.stage(stage).column("sample_id").to_pylist()]
    assert len(ids) == len(set(ids)) > 50


def test_more_than_one_percent_repeated_events_is_a_warning(tmp_path, caplog):
    rows = liked_and_disliked(30)
    caplog.set_level(logging.WARNING)
    assert build(tmp_path, rows).manifest.warnings == []
    assert not caplog.records
    constant = [r | {"kafka_offset": 1000 + n} for n, r in enumerate(rows[:5])]
    dataset = build(tmp_path / "again", [*rows, *constant], version=1)
    assert dataset.manifest.duplicates == 5
    assert "constant event_id" in dataset.manifest.warnings[0]
    assert "duplicates=5" in caplog.text


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], EmptyLog, "feedback log is empty"),
        ([row("like", signed=False)], EmptyLog, "unsigned request ids"),
        ([row("impression")], TooFewLikes, "0 liked items"),
        ([row("like")], TooFewLikes, "1 liked items give 0 samples"),
    ],
)
def test_what_cannot_be_learned_from_is_one_clear_line_and_leaves_nothing(tmp_path, rows, error, words):
    with pytest.raises(error, match=words) as raised:
        build(tmp_path, rows)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "datasets").exists() or not list((tmp_path / "datasets").iterdir())


def test_a_dataset_without_a_manifest_is_not_one(tmp_path):
    dataset = build(tmp_path, liked_and_disliked())
    with pytest.raises(DatasetMissing, match="no finished dataset"):
        PreferenceDataset.open(tmp_path)
    raw = json.loads((dataset.path / "manifest.json").read_text())
    (dataset.path / "manifest.json").write_text(json.dumps(raw | {"format": 99}))
    with pytest.raises(DatasetMissing, match="format 99"):
        PreferenceDataset.open(dataset.path)
    (dataset.path / "manifest.json").write_text("{")
    with pytest.raises(DatasetMissing, match="cannot be read"):
        PreferenceDataset.open(dataset.path)


def test_rows_that_were_changed_or_cut_are_noticed(tmp_path):
    dataset = build(tmp_path, liked_and_disliked())
    pq.write_table(dataset.stage("easy").slice(1), dataset.path / "easy.parquet")
    with pytest.raises(FeaturesError, match="not what its manifest says"):
        dataset.verify()
    (dataset.path / "easy.parquet").write_bytes(b"PAR1")
    with pytest.raises(FeaturesError, match="build it again"):
        dataset.stage("easy")


STALLED_BUILD = """
import itertools, sys
from pathlib import Path
from features.datasets import PreferenceDataset
from features.log import LOG_SCHEMA, LogSnapshot
from tests.features.test_datasets import BUILT, LATER, of

root, stop_at = Path(sys.argv[1]), sys.argv[2]
shards = itertools.count(1)

def stall():
    print("there", flush=True)
    sys.stdin.read()

def progress(done, users):
    if str(next(shards)) == stop_at:
        stall()

def clock():
    if stop_at == "manifest":
        stall()
    return BUILT

files = [str(path) for path in root.glob("log/*/*.parquet")]
snapshot = LogSnapshot(version=0, files=files, watermark=LATER, schema=LOG_SCHEMA)
PreferenceDataset.build(
    snapshot, of(rows_per_shard=200), root / "datasets", clock=clock, progress=progress
)
"""


def test_a_build_killed_at_any_moment_leaves_nothing_that_looks_finished(tmp_path):
    rows = draw_rows(random.Random(9), users=60, most=40)
    write_snapshot(tmp_path / "log", rows, LATER)
    for stop_at in ("1", "3", "manifest"):
        command = [sys.executable, "-c", STALLED_BUILD, str(tmp_path), stop_at]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "there\n"
            child.kill()
        assert child.returncode == -signal.SIGKILL
        left = list((tmp_path / "datasets").iterdir())
        assert left
        assert all(path.name.startswith(".building-") for path in left)
        assert named_versions(tmp_path / "datasets") == set()
    long_ago = time.time() - 200_000
    for path in left:
        os.utime(path, (long_ago, long_ago))
    dataset = build(tmp_path, rows)
    assert list((tmp_path / "datasets").iterdir()) == [dataset.path]


FULL_DISK_BUILD = """
import resource, sys
from pathlib import Path
from features.datasets import PreferenceDataset
from features.errors import FeaturesError
from features.log import LOG_SCHEMA, LogSnapshot
from tests.features.test_datasets import LATER, of

root = Path(sys.argv[1])
files = [str(path) for path in root.glob("log/*/*.parquet")]
snapshot = LogSnapshot(version=0, files=files, watermark=LATER, schema=LOG_SCHEMA)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    PreferenceDataset.build(snapshot, of(), root / "datasets")
except FeaturesError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_nothing(tmp_path):
    write_snapshot(tmp_path / "log", liked_and_disliked(60), LATER)
    command = [sys.executable, "-c", FULL_DISK_BUILD, str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith("the dataset cannot be built: ")
    assert line.endswith("; free disk space or memory, then start again")
    assert list((tmp_path / "datasets").iterdir()) == []


def test_the_rows_hash_sees_every_value_and_no_batch_boundary():
    table = pa.table(
        {
            "text": ["a", None, "bc", ""],
            "items": [["x", "yz"], [], None, ["x"]],
            "at": pa.array([1, None, 3, 4], pa.timestamp("us", "UTC")),
            "share": [0.5, None, 0.0, 1.0],
        }
    )

    def hash_of(*parts):
        rows = RowsHash(table.schema.names)
        for part in parts:
            rows.update(part)
        return rows.hexdigest()

    whole = hash_of(table)
    assert hash_of(table.slice(0, 1), table.slice(1, 2), table.slice(3)) == whole
    changed = [
        {"text": ["a", "", "bc", ""]},
        {"text": ["ab", None, "c", ""]},
        {"items": [["x"], ["yz"], None, ["x"]]},
        {"items": [["x", "yz"], None, [], ["x"]]},
        {"share": [0.5, 0.0, 0.0, 1.0]},
    ]
    columns = {name: table.column(name) for name in table.schema.names}
    hashes = {hash_of(pa.table(columns | change)) for change in changed} | {hash_of(table.slice(0, 3))}
    assert len(hashes | {whole}) == len(changed) + 2
