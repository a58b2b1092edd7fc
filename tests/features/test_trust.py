"""Forged feedback: marked by its definition, and as good as never sent."""

import random
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.datasets import EmptyLog, PreferenceDataset, TooFewLikes
from features.settings import DatasetSettings, FeatureSettings, TrustSettings
from features.trust import marked_feedback
from tests.features.drawn_feedback import draw_rows
from tests.features.feedback_oracle import EPOCH, landing, row, write_snapshot

LATER = EPOCH + timedelta(days=1)
STRICT = TrustSettings(
    max_feedback_age_s=1800.0,
    off_slate=True,
    organic_until=EPOCH + timedelta(hours=2, seconds=4),
    max_events_per_user_day=9,
    max_events_per_request=4,
)


def of(trust=None, **dataset):
    return FeatureSettings(
        duck={"threads": 1},
        trust=trust or TrustSettings(),
        dataset=DatasetSettings(min_samples=1, **dataset),
    )


def marks_by_definition(rows, trust):
    """(user, landing) -> mark, said as plainly as it can be."""
    found, believed = {}, [e for e in rows if e["signed"] is not False]
    slates = {}
    for event in believed:
        if event["kind"] == "served" and event["request_id"] is not None:
            slates.setdefault((event["user_id"], event["request_id"]), []).append(event)
    owned = {e["request_id"] for e in believed if e["kind"] == "served"}
    for event in rows:
        if event["signed"] is False:
            found[event["user_id"], landing(event)] = "unsigned"
            continue
        if mark := _mark(event, slates, owned, trust):
            found[event["user_id"], landing(event)] = mark
    for key, most, name in (
        (lambda e: (e["user_id"], e["landed_at"].date()), trust.max_events_per_user_day, "user_cap"),
        (lambda e: (e["user_id"], e["request_id"]), trust.max_events_per_request, "request_cap"),
    ):
        groups = {}
        for event in sorted(believed, key=landing):
            if event["kind"] == "served" or found.get((event["user_id"], landing(event))) in _CERTAIN:
                continue
            if name == "request_cap" and event["request_id"] is None:
                continue
            groups.setdefault(key(event), []).append(event)
        for group in groups.values():
            for event in group[most:] if most is not None else []:
                at = event["user_id"], landing(event)
                found[at] = min(found.get(at, name), name)  # too much both ways: one name for it
    return found


_CERTAIN = {"unsigned", "cross_user", "replayed", "off_slate", "position", "organic"}


def _mark(event, slates, owned, trust):
    request, served = event["request_id"], event["kind"] == "served"
    if request is None:
        since = trust.organic_until
        return "organic" if since is not None and not served and event["landed_at"] >= since else None
    slate = slates.get((event["user_id"], request))
    if slate is None:
        return "cross_user" if trust.cross_user and request in owned else None
    age = trust.max_feedback_age_s
    asked_at = min(e["arrived_at"] for e in slate)
    if age is not None and event["arrived_at"] > asked_at + timedelta(seconds=age):
        return "replayed"
    if served:
        return None
    places = [e["position"] for e in slate if e["item_id"] == event["item_id"]]
    if trust.off_slate and not places:
        return "off_slate"
    known = any(e["position"] is not None for e in slate)
    if trust.positions and event["position"] is not None and known and None not in places:
        return None if event["position"] in places else "position"
    return None


def draw_forged(pick, users):
    """Drawn feedback in which users name each other's requests, and places of slates."""
    rows = draw_rows(pick, users=users, most=25)
    for event in rows:
        if event["kind"] != "served" and event["request_id"] is not None and pick.random() < 0.3:
            event["request_id"] = f"u{pick.randint(0, users)}-r{pick.randint(0, 1)}"
        if pick.random() < 0.7:
            event["position"] = pick.randint(1, 4)
    return rows


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.randoms(use_true_random=False))
def test_marks_are_their_definition_whatever_arrives(tmp_path, pick):
    rows = draw_forged(pick, users=4)
    trust = pick.choice([TrustSettings(), STRICT, TrustSettings.none()])
    snapshot = write_snapshot(Path(tempfile.mkdtemp(dir=tmp_path)), rows, LATER)
    found = marked_feedback(snapshot, of(trust)).to_pylist()
    defined = marks_by_definition(rows, trust)
    assert sorted((r["user_id"], r["landed_at"], r["mark"]) for r in found) == sorted(
        (user, at[0], mark) for (user, at), mark in defined.items()
    )


def dataset_of(folder, rows, chosen):
    try:
        built = PreferenceDataset.build(
            write_snapshot(folder / "log", rows, LATER), chosen, folder / "datasets"
        )
    except (TooFewLikes, EmptyLog) as error:
        return type(error).__name__.replace("EmptyLog", "TooFewLikes")
    return built.dataset_id


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.randoms(use_true_random=False))
def test_a_dataset_is_as_if_marked_feedback_had_never_been_sent(tmp_path, pick):
    rows, folder = draw_forged(pick, users=4), Path(tempfile.mkdtemp(dir=tmp_path))
    defined = marks_by_definition(rows, STRICT)
    clean = [e for e in rows if (e["user_id"], landing(e)) not in defined]
    assert dataset_of(folder / "whole", rows, of(STRICT)) == dataset_of(
        folder / "clean", clean, of(TrustSettings.none())
    )


def slate(user="u", request="r", at=0.0):
    """Three items served, the first disliked and the second liked: one easy sample."""
    items = "abc"
    served = [
        row("served", item, user, at=at, request_id=request, position=n + 1, offset=n)
        for n, item in enumerate(items)
    ]
    return [
        *served,
        row("dislike", "a", user, at=at + 1, request_id=request, position=1, offset=5),
        row("like", "b", user, at=at + 2, request_id=request, position=2, offset=6),
    ]


FORGERIES = {
    "cross_user": row("like", "b", "thief", at=3, request_id="r", offset=20),
    "replayed": row("like", "c", "u", at=60 * 24 * 40, request_id="r", position=3, offset=20),
    "position": row("like", "c", "u", at=3, request_id="r", position=1, offset=20),
    "unsigned": row("like", "c", "u", at=3, request_id="r", signed=False, offset=20),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The dataset of the slate alone."""
    return dataset_of(tmp_path_factory.mktemp("honest"), slate(), of())


@pytest.mark.parametrize("mark", FORGERIES)
def test_each_forgery_is_stored_marked_and_not_learned_from(tmp_path, mark, honest):
    snapshot = write_snapshot(tmp_path / "log", [*slate(), FORGERIES[mark]], LATER)
    (marked,) = marked_feedback(snapshot, of()).to_pylist()
    assert (marked["mark"], marked["event_id"]) == (mark, FORGERIES[mark]["event_id"])
    built = PreferenceDataset.build(snapshot, of(), tmp_path / "datasets")
    assert built.dataset_id == honest
    counted = {"unsigned": built.manifest.unsigned, **built.manifest.marked}
    assert counted[mark] == 1
    assert built.manifest.rows == len(slate()) + 1


def test_honest_feedback_carries_no_mark(tmp_path):
    rows = [*slate(), *slate("v", "s"), row("like", "z", "u", at=9, request_id="another-system", offset=30)]
    rows.append(row("click", "z", "u", at=9, request_id="r", offset=31))  # on from the slate to another item
    assert marked_feedback(write_snapshot(tmp_path, rows, LATER), of()).num_rows == 0


def test_a_flood_under_one_request_counts_as_far_as_the_cap(tmp_path):
    chosen = of(TrustSettings(max_events_per_request=6))
    flood = [row("click", "c", at=3, request_id="r", offset=10 + n, event_id=f"x{n}") for n in range(40)]
    marked = marked_feedback(write_snapshot(tmp_path, [*slate(), *flood], LATER), chosen).to_pylist()
    assert [r["mark"] for r in marked] == ["request_cap"] * 36  # two of the slate's answers came first
    assert {r["event_id"] for r in marked} == {f"x{n}" for n in range(4, 40)}


def test_with_the_defences_off_the_dataset_is_what_it_always_was(tmp_path):
    rows = draw_rows(random.Random(5), users=30, most=30)
    found = dataset_of(tmp_path, rows, of(TrustSettings.none()))
    assert found == PINNED


PINNED = "d6a1531fee611a40"
"""Measured on the commit before there were marks."""
