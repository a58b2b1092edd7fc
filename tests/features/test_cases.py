import random
from datetime import timedelta

import pytest

from features.cases import RANKING_SCHEMA, SLATE_SCHEMA, evaluation_cases
from features.settings import DatasetSettings, FeatureSettings
from features.split import role_of
from tests.features.drawn_feedback import draw_rows
from tests.features.feedback_oracle import (
    EPOCH,
    all_in_force,
    asked,
    history_of,
    is_served,
    of_each_user,
    once,
    order,
    row,
    slate_asked,
    write_snapshot,
)

SETTINGS = FeatureSettings(
    history_length=3,
    history_look_back=5,
    duck={"threads": 1},
    dataset=DatasetSettings(rows_per_shard=2000, max_cases_per_user=1),
)
WINDOW = timedelta(seconds=SETTINGS.attribution_window_s)
LATER = EPOCH + timedelta(days=1)
SPLIT = {"gate_share": 0.4, "stop_share": 0.3}


def known(events, user, at, landed, without):
    return history_of(events, user, at, landed, without, SETTINGS.history_look_back, SETTINGS.history_length)


def slates_of(events, user, forced, since):
    found = []
    for request in {e["request_id"] for e in events if e["kind"] == "served" and e["request_id"]}:
        served = [e for e in events if is_served(e, user, request)]
        judged = sorted({e["item_id"] for e in served if (user, e["item_id"]) in forced})
        levels = [forced[user, item][0] for item in judged]
        if 1 not in levels or set(levels) == {1} or min(e["arrived_at"] for e in served) <= since:
            continue
        at, landed = slate_asked(events, user, request)
        found.append((landed, {
            "user_id": user, "request_id": request, "asked_at": at,
            "history": known(events, user, at, landed, set(judged)), "items": judged, "levels": levels,
        }))  # fmt: skip
    latest = sorted(found, key=lambda case: case[0])[-1:]
    return sorted((case for _, case in latest), key=lambda case: (case["asked_at"], case["request_id"]))


def ranking_of(events, user, forced, since):
    found = []
    for (_, item), (level, like) in forced.items():
        at, landed, request, served = asked(events, user, item, like, WINDOW)
        if level != 1 or like["arrived_at"] <= since or (served and served["propensity"] is None):
            continue
        found.append((order(like), {
            "user_id": user, "history": known(events, user, at, landed, {item}), "target": item,
            "asked_at": at, "request_id": request, "sampled": served is not None,
        }))  # fmt: skip
    latest = sorted(found, key=lambda case: case[0])[-1:]
    return sorted((case for _, case in latest), key=lambda case: case["target"])


@pytest.mark.parametrize("role", ["gate", "stop"])
def test_cases_are_their_definition_for_a_crowd(tmp_path, role):
    rows = draw_rows(random.Random(4), users=450, most=40)
    since = EPOCH + timedelta(minutes=5)
    cases = evaluation_cases(write_snapshot(tmp_path, rows, LATER), SETTINGS, role=role, since=since, **SPLIT)
    slates, ranking = [], []
    for user, events in sorted(of_each_user(once(rows)).items()):
        if role_of(user, **SPLIT) == role:
            forced = all_in_force(events, LATER, WINDOW)
            slates += slates_of(events, user, forced, since)
            ranking += ranking_of(events, user, forced, since)
    names = [name for name in SLATE_SCHEMA.names if name not in ("policy_version", "sampled")]
    assert cases.slates.schema == SLATE_SCHEMA
    assert cases.slates.select(names).to_pylist() == slates
    assert cases.ranking.schema == RANKING_SCHEMA
    assert cases.ranking.to_pylist() == ranking
    assert len(slates) > 10
    assert len(ranking) > 10


def test_a_logged_slate_says_who_served_it_and_whether_it_was_sampled(tmp_path):
    served = {"request_id": "r", "policy_version": "v3", "propensity": 0.1}
    rows = [
        row("served", "a", offset=0, **served),
        row("served", "b", offset=1, **served),
        row("like", "a", at=1, request_id="r", offset=2),
        row("hide", "b", at=1, request_id="r", offset=3),
    ]
    snapshot = write_snapshot(tmp_path, rows, LATER)
    cases = evaluation_cases(snapshot, SETTINGS, gate_share=0.5, stop_share=0.0, role=role_of("u", 0.5, 0.0))
    (slate,) = cases.slates.to_pylist()
    assert (slate["policy_version"], slate["sampled"]) == ("v3", True)
    assert (slate["items"], slate["levels"]) == (["a", "b"], [1, -1])
    (like,) = cases.ranking.to_pylist()
    assert (like["target"], like["sampled"], like["request_id"]) == ("a", True, "r")


def test_a_like_that_the_policy_itself_selected_is_no_ranking_case(tmp_path):
    rows = [
        row("served", "a", offset=0, request_id="r", policy_version="v3"),
        row("like", "a", at=1, request_id="r", offset=1),
        row("like", "b", at=2, offset=2),
    ]
    snapshot = write_snapshot(tmp_path, rows, LATER)
    cases = evaluation_cases(snapshot, SETTINGS, gate_share=0.5, stop_share=0.0, role=role_of("u", 0.5, 0.0))
    assert cases.ranking.column("target").to_pylist() == ["b"]


def test_without_users_of_the_role_there_are_no_cases(tmp_path):
    snapshot = write_snapshot(tmp_path, [row("like")], LATER)
    cases = evaluation_cases(snapshot, SETTINGS, gate_share=0.0, stop_share=0.0)
    assert (cases.slates.num_rows, cases.ranking.num_rows) == (0, 0)
    empty = evaluation_cases(write_snapshot(tmp_path, [], None), SETTINGS, **SPLIT)
    assert (empty.slates.schema, empty.ranking.schema) == (SLATE_SCHEMA, RANKING_SCHEMA)
