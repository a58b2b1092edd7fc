"""Damaged policies, codecs of another policy, moves of the reference that cannot be."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.directory import MANIFEST, read_manifest, write_manifest
from tests.bad_input.place import Place
from tests.bad_input.test_store import LEASE
from tests.policies.factory import tiny_codec
from tests.trainer.round_world import ITEMS

WEIGHTS = "model/model.safetensors"


def flipped(policy: Path) -> None:
    raw = bytearray((policy / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (policy / WEIGHTS).write_bytes(raw)


def truncated(policy: Path) -> None:
    (policy / WEIGHTS).write_bytes((policy / WEIGHTS).read_bytes()[:100])


def missing(policy: Path) -> None:
    (policy / WEIGHTS).unlink()


def pickled(policy: Path) -> None:
    (policy / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def unreadable(policy: Path) -> None:
    (policy / MANIFEST).write_text("{")


def half_written(policy: Path) -> None:
    (policy / MANIFEST).unlink()


def from_the_future(policy: Path) -> None:
    facts = json.loads((policy / MANIFEST).read_text())
    (policy / MANIFEST).write_text(json.dumps(facts | {"format": 2}))


def other_codec(policy: Path) -> None:
    shutil.rmtree(policy / "codec")
    tiny_codec(ITEMS, seed=4, quantizer="other").save(policy / "codec")


def codec_sealed_wrongly(policy: Path) -> None:
    """Every file is what the manifest says, and yet the codec is not the one the policy speaks."""
    manifest = read_manifest(policy)
    codec = manifest.codec.model_copy(update={"quantizer_hash": "another"})
    write_manifest(policy, manifest.model_copy(update={"codec": codec}))


DAMAGES = [
    pytest.param(flipped, "model.safetensors", id="flipped"),
    pytest.param(truncated, "model.safetensors", id="truncated"),
    pytest.param(missing, "model.safetensors", id="missing"),
    pytest.param(pickled, "pytorch_model.bin", id="pickled"),
    pytest.param(unreadable, "policy.json", id="unreadable"),
    pytest.param(half_written, "policy.json", id="half-written"),
    pytest.param(from_the_future, "format 2", id="from-the-future"),
    pytest.param(other_codec, "codec", id="other-codec"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
@pytest.mark.parametrize(
    "arguments",
    [["recommend", "user-000"], ["policy", "promote", "v2"], ["policy", "show", "v2"], ["round"]],
    ids=["recommend", "promote", "show", "round"],
)
def test_a_damaged_policy_is_refused(
    place: Place, arguments: list[str], damage: Callable[[Path], None], says: str
) -> None:
    """``v2`` is damaged; where the reference is asked for, the reference is it."""
    policies = place.home / "policies"
    if arguments[0] == "policy":
        shutil.copytree(policies / "v1", policies / "v2")
        damage(policies / "v2")
    else:
        damage(policies / "v1")
    before, files = place.counts(), place.files(but=LEASE)
    place.in_fork(*arguments).refused(2, says)
    assert (place.counts(), place.files(but=LEASE)) == (before, files)


@pytest.mark.parametrize(
    "arguments",
    [
        ["recommend", "user-000"],
        ["policy", "promote", "v1"],
        ["codec", "encode", "item-001", "--policy", "v1"],
    ],
    ids=["recommend", "promote", "codec"],
)
@pytest.mark.parametrize("damage", [other_codec, codec_sealed_wrongly])
def test_a_codec_that_is_not_the_policys_is_refused(
    place: Place, arguments: list[str], damage: Callable[[Path], None]
) -> None:
    damage(place.home / "policies" / "v1")
    before, files = place.counts(), place.files()
    place.in_fork(*arguments).refused(2, "codec")
    assert (place.counts(), place.files()) == (before, files)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["policy", "rollback"], 2, "no earlier reference"),
        (["policy", "rollback", "--to", "v9"], 2, "v9 is not registered"),
        (["policy", "promote", "v9"], 2, "v9 is not registered"),
        (["policy", "promote", "../v1"], 2, "is not registered"),
        (["policy", "promote", "v1"], 1, "already the reference"),
        (["policy", "promote", "v1", "--expects", "v7"], 1, "policy history"),
        (["policy", "show", "v9"], 2, "v9 is not registered"),
        (["recommend", "user-000", "--policy", "v9"], 2, "v9 is not registered"),
        (["recommend", "user-000", "--device", "cuda:7"], 2, "cuda:7"),
        (["round", "--resume", "r9999"], 2, "no round r9999"),
        (["round", "--resume", "last"], 2, "no round last"),
        (["codec", "show", "--policy", "v9"], 2, "v9 is not registered"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_move_that_cannot_be_moves_nothing(
    place: Place, arguments: list[str], code: int, says: str
) -> None:
    before, files = place.counts(), place.files(but=LEASE)
    place.in_fork(*arguments).refused(code, says)
    assert (place.counts(), place.files(but=LEASE)) == (before, files)
