"""Own slates first, recency, replay, propensity: what each does to a dataset, and that off is off."""

import math
import random
import tempfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from features.datasets import SAMPLE_SCHEMA, WEIGHTED_SCHEMA, EmptyLog, PreferenceDataset, TooFewLikes
from features.settings import DatasetSettings
from tests.features.drawn_feedback import draw_rows
from tests.features.feedback_oracle import EPOCH, all_in_force, landing, once, row
from tests.features.test_datasets import LATER, build, liked_and_disliked, of

STAGES = ("easy", "hard")
# No shrinking: an example is three builds of a dataset, and shrinking one takes minutes.
DRAWN = settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=(Phase.generate,),
)


def fresh_folder(tmp_path):
    return Path(tempfile.mkdtemp(dir=tmp_path))  # an equal dataset that is there already would be kept


def drawn(pick, users=12, most=30):
    """Feedback at its worst, its slates with places and all sorts of propensities."""
    rows = draw_rows(pick, users=users, most=most)
    for event in rows:
        if event["kind"] == "served":
            event["position"] = pick.choice([None, 1, 2, 5])
            event["propensity"] = pick.choice([None, 0.9, 0.25, 0.01])
    return rows


def samples_of(dataset, stage):
    return {(r["user_id"], r["chosen"]): r for r in dataset.stage(stage).to_pylist()}


def try_build(folder, rows, **options):
    try:
        return build(folder, rows, **options)
    except (TooFewLikes, EmptyLog):
        return None


def without_weight(samples):
    return {pair: {k: v for k, v in r.items() if k != "weight"} for pair, r in samples.items()}


# -- off ---------------------------------------------------------------------------------------------------


def test_options_that_have_nothing_to_do_change_no_id(tmp_path):
    rows = draw_rows(random.Random(11), users=40, most=30)
    plain = build(tmp_path / "plain", rows)
    idle = of(prefer_own_slates=True, replay_share=0.5)  # no lineage is given, and there is no window
    assert build(tmp_path / "idle", rows, chosen=idle).dataset_id == plain.dataset_id
    assert plain.stage("easy").schema == SAMPLE_SCHEMA
    assert plain.manifest.format == 1
    assert plain.manifest.settings["replay_share"] == 0.0
    assert {counts.replayed for counts in plain.manifest.stages.values()} == {0}


def test_options_are_in_the_manifest_and_name_their_queries(tmp_path):
    rows = liked_and_disliked(20)
    plain = build(tmp_path / "plain", rows).manifest
    chosen = of(recency_half_life_s=60.0, propensity_clip=10, position_bias=0.5, replay_share=0.25)
    weighed = build(tmp_path / "weighed", rows, chosen=chosen, lineage=["v3", "v1"])
    manifest = PreferenceDataset.open(weighed.path).manifest
    told = {"recency_half_life_s": 60.0, "propensity_clip": 10.0, "position_bias": 0.5, "replay_share": 0.25}
    assert told.items() <= manifest.settings.items()
    assert manifest.settings["lineage"] == []  # no slates are preferred
    assert manifest.format == 2
    assert manifest.queries_hash != plain.queries_hash
    assert manifest.dataset_id != plain.dataset_id
    assert weighed.stage("hard").schema == WEIGHTED_SCHEMA
    weighed.verify()


def test_a_bias_without_propensities_to_correct_is_refused():
    with pytest.raises(ValidationError, match="position_bias weighs only with propensity_clip"):
        DatasetSettings(position_bias=1.0)
    for impossible in ({"replay_share": 1.0}, {"propensity_clip": 0.5}, {"recency_half_life_s": 0.0}):
        with pytest.raises(ValidationError):
            DatasetSettings.model_validate(impossible)


# -- own slates --------------------------------------------------------------------------------------------


def slate(number, version, *, at):
    """One request whose slate has a liked and a disliked item of its own."""
    of_slate = {"request_id": f"r{number}"}
    kinds = [
        ("served", f"a{number}"),
        ("served", f"b{number}"),
        ("like", f"a{number}"),
        ("dislike", f"b{number}"),
    ]
    return [
        row(kind, item, at=at + n, offset=10 * number + n, **of_slate)
        | ({"policy_version": version} if kind == "served" else {})
        for n, (kind, item) in enumerate(kinds)
    ]


def test_a_cap_keeps_slates_of_the_lineage_before_later_ones_of_others(tmp_path):
    versions = ["v1", "v2", "v9", "v2", "v9", None]
    rows = [event for n, version in enumerate(versions) for event in slate(n, version, at=10 * n)]
    chosen = of(max_samples_per_user=3, prefer_own_slates=True)

    def kept(name, **options):
        return sorted(item for _, item in samples_of(build(tmp_path / name, rows, **options), "easy"))

    assert kept("latest", chosen=of(max_samples_per_user=3), lineage=["v2"]) == ["a3", "a4", "a5"]
    assert kept("own", chosen=chosen, lineage=["v2", "v1"]) == ["a0", "a1", "a3"]
    assert kept("few", chosen=chosen, lineage=["v2"]) == ["a1", "a3", "a5"]
    wide = of(max_samples_per_user=50, prefer_own_slates=True)
    everything = build(tmp_path / "all", rows, chosen=of(max_samples_per_user=50)).dataset_id
    assert build(tmp_path / "wide", rows, chosen=wide, lineage=["v2"]).dataset_id == everything


# -- recency -----------------------------------------------------------------------------------------------


def arrivals(rows, chosen):
    """(user, item) -> when the like in force arrived."""
    window = timedelta(seconds=chosen.attribution_window_s)
    forced = all_in_force(once(rows), LATER, window)
    return {pair: event["arrived_at"] for pair, (level, event) in forced.items() if level == 1}


@DRAWN
@given(pick=st.randoms(use_true_random=False), half_life=st.sampled_from([30.0, 600.0, 86_400.0]))
def test_weights_halve_with_every_half_life_of_age(tmp_path, pick, half_life):
    rows = drawn(pick)
    since = pick.choice([None, EPOCH + timedelta(minutes=20)])
    folder = fresh_folder(tmp_path)
    chosen = of(recency_half_life_s=half_life)
    dataset = try_build(folder, rows, chosen=chosen, since=since)
    plain = try_build(folder, rows, since=since, version=1)
    assert (dataset is None) == (plain is None)
    if dataset is None:
        return
    dataset.verify()
    arrived = arrivals(rows, chosen)
    for stage in STAGES:
        found = samples_of(dataset, stage)
        assert without_weight(found) == samples_of(plain, stage)
        longest = None if since is None else (LATER - since).total_seconds()
        ages = {pair: (LATER - arrived[pair]).total_seconds() for pair in found}
        ages = {pair: min(age, longest or age, 20 * half_life) for pair, age in ages.items()}
        expected = normalised({pair: 2.0 ** -(age / half_life) for pair, age in ages.items()})
        assert {pair: r["weight"] for pair, r in found.items()} == pytest.approx(expected, rel=1e-5, abs=2e-9)
        assert_weights([r["weight"] for r in found.values()])


def normalised(weights):
    mean = np.mean(list(weights.values())) if weights else 1.0
    return {pair: weight / mean for pair, weight in weights.items()}


def assert_weights(weights):
    assert all(weight > 0 for weight in weights)
    if weights:
        assert np.mean(weights) == pytest.approx(1.0, abs=1e-6)


# -- propensity --------------------------------------------------------------------------------------------


@DRAWN
@given(
    pick=st.randoms(use_true_random=False),
    clip=st.sampled_from([1.0, 3.0, 50.0, 1000.0]),
    bias=st.sampled_from([0.0, 1.0, 0.5]),
)
def test_sampled_slates_weigh_by_clipped_inverse_propensity_and_others_as_much_on_average(
    tmp_path, pick, clip, bias
):
    rows = drawn(pick)
    dataset = try_build(fresh_folder(tmp_path), rows, chosen=of(propensity_clip=clip, position_bias=bias))
    if dataset is None:
        return
    places = {}
    for event in sorted(once(rows), key=landing, reverse=True):
        if event["kind"] == "served" and event["position"] is not None:
            places[event["user_id"], event["request_id"], event["item_id"]] = event["position"]
    for stage in STAGES:
        found = samples_of(dataset, stage)
        sampled = {pair: r for pair, r in found.items() if r["propensity"] is not None}
        inverse = {
            pair: min(
                places.get((r["user_id"], r["request_id"], r["chosen"]), 1) ** bias / r["propensity"], clip
            )
            for pair, r in sampled.items()
        }
        expected = dict.fromkeys(found, 1.0) | normalised(inverse)
        assert {pair: r["weight"] for pair, r in found.items()} == pytest.approx(expected, rel=1e-6)
        assert_weights([r["weight"] for r in found.values()])
        if clip == 1.0:
            assert {round(r["weight"], 6) for r in found.values()} <= {1.0}


def test_recency_and_propensity_multiply(tmp_path):
    rows = drawn(random.Random(4), users=60)
    recency, propensity = {"recency_half_life_s": 900.0}, {"propensity_clip": 20.0}
    one, other, both = (
        build(tmp_path / name, rows, chosen=of(**options)).stage("easy").column("weight").to_numpy()
        for name, options in (("r", recency), ("p", propensity), ("b", recency | propensity))
    )
    assert len(both) > 50
    np.testing.assert_allclose(both, one * other / np.mean(one * other), rtol=1e-6)


# -- replay ------------------------------------------------------------------------------------------------


@DRAWN
@given(
    pick=st.randoms(use_true_random=False),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    cap=st.sampled_from([1, 2, 50]),
)
def test_a_replay_adds_a_share_of_older_samples_and_changes_no_other(tmp_path, pick, share, cap):
    rows = drawn(pick, users=15)
    since = EPOCH + timedelta(minutes=pick.choice([15, 35, 60]))
    folder = fresh_folder(tmp_path)
    window = try_build(folder, rows, chosen=of(max_samples_per_user=cap), since=since)
    everything = try_build(folder, rows, chosen=of(max_samples_per_user=1000), version=1)
    if window is None or everything is None:
        return
    replaying = of(max_samples_per_user=cap, replay_share=share)
    replayed = build(folder / "replayed", rows, chosen=replaying, since=since)  # else an equal one is kept
    arrived = arrivals(rows, replaying)
    for stage in STAGES:
        fresh, found = samples_of(window, stage), samples_of(replayed, stage)
        older = {pair: r for pair, r in samples_of(everything, stage).items() if arrived[pair] <= since}
        added = {pair: r for pair, r in found.items() if pair not in fresh}
        assert found == fresh | {pair: older[pair] for pair in added}
        by_user = [sum(user == pair[0] for pair in older) for user in {pair[0] for pair in older}]
        candidates = sum(min(count, math.ceil(share * cap)) for count in by_user)
        assert len(added) == min(candidates, math.floor(len(fresh) * share / (1 - share) + 0.5))
        counts = replayed.manifest.stages[stage]
        assert (counts.replayed, counts.older) == (len(added), candidates)
        assert counts.refused == window.manifest.stages[stage].refused
    assert replayed.manifest.likes == window.manifest.likes


def test_the_same_replay_is_drawn_whatever_the_threads_and_shards_and_another_by_another_window(tmp_path):
    rows = drawn(random.Random(8), users=40)
    since = EPOCH + timedelta(minutes=55)
    options = {"replay_share": 0.4, "recency_half_life_s": 600.0, "propensity_clip": 5.0}
    several = [
        of(**options),
        of(threads=2, rows_per_shard=200, **options),
        of(rows_per_shard=10_000_000, **options),
    ]
    built = [build(tmp_path / str(n), rows, chosen=chosen, since=since) for n, chosen in enumerate(several)]
    assert len({dataset.dataset_id for dataset in built}) == 1
    assert not list(built[1].path.glob(".*")), "drafts are gone"
    again = build(tmp_path / "later", rows, chosen=several[0], since=since + timedelta(seconds=1))
    old = arrivals(rows, several[0])

    def replayed(dataset):
        return {pair for pair in samples_of(dataset, "easy") if old[pair] <= since}

    first, second = replayed(built[0]), replayed(again)
    assert len(first) == len(second) > 5
    assert first != second


def test_replayed_samples_fade_no_further_than_the_windows_edge(tmp_path):
    rows = [
        event
        for n in range(40)
        for event in (
            row("dislike", "n", f"u{n}", at=0, offset=3 * n),
            row("like", "h", f"u{n}", at=1, offset=3 * n + 1),
            row("like", "a", f"u{n}", at=500, offset=3 * n + 2),
        )
    ]
    edge = EPOCH + timedelta(minutes=400)
    chosen = of(replay_share=0.5, recency_half_life_s=3600.0)
    found = samples_of(build(tmp_path, rows, chosen=chosen, since=edge), "easy")
    weights = {item: {r["weight"] for (_, i), r in found.items() if i == item} for item in "ah"}
    (late,), (old,) = weights["a"], weights["h"]
    assert late / old == pytest.approx(2 ** (100 / 60), rel=1e-6)
