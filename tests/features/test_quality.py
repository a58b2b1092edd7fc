"""Bounds of the data: ordinary days pass, each planted bad day is told by its own name."""

from datetime import timedelta

import numpy as np
import pytest

from features.quality import quality_of
from features.settings import FeatureSettings, QualitySettings
from tests.features.feedback_oracle import EPOCH, row, write_snapshot

DAYS, USERS, EVENTS = 5, 60, 400
END = EPOCH + timedelta(days=DAYS)
CHOSEN = FeatureSettings(duck={"threads": 1}, quality=QualitySettings(min_events=100))
LEVELS = ("impression", "impression", "like", "dislike", "click")


def day(number, random, *, events=EVENTS, users=USERS, kinds=LEVELS, items=40, **columns):
    """One day's feedback, as people give it."""
    made = []
    for place in range(events):
        made.append(
            row(
                kinds[int(random.integers(len(kinds)))],
                f"i{int(random.integers(items))}",
                f"u{int(random.integers(users))}",
                at=number * 1440 + 1 + place % 1438,
                offset=number * 10_000 + place,
                source="web",
                **columns,
            )
        )
    return made


def served(number, propensity):
    return [
        row("served", f"i{n}", f"u{n}", at=number * 1440 + 5, offset=number * 10_000 + 9000 + n,
            request_id=f"r{number}-{n}", propensity=propensity)
        for n in range(10)
    ]  # fmt: skip


def days(seed, last=None):
    """Ordinary days, with ``last`` in place of the last."""
    random = np.random.default_rng(seed)
    rows = [event for number in range(DAYS - 1) for event in day(number, random) + served(number, 0.2)]
    return rows + (last(random) if last else day(DAYS - 1, random) + served(DAYS - 1, 0.2))


def found(folder, rows, chosen=CHOSEN):
    return quality_of(write_snapshot(folder, rows, END), chosen)


@pytest.mark.parametrize("seed", range(3))
def test_ordinary_days_are_within_every_bound(tmp_path, seed):
    report = found(tmp_path, days(seed))
    assert report.breaches == ()
    assert report.compared == DAYS - 1
    assert [one["events"] for one in report.periods] == [EVENTS] * DAYS


def app_that_sends_only_likes(random):
    app = day(DAYS - 1, random, events=80, kinds=("like",), users=USERS)
    return day(DAYS - 1, random) + [
        event | {"source": "app", "event_id": f"a{n}"} for n, event in enumerate(app)
    ]


def greedy_user(random):
    rows = day(DAYS - 1, random)
    return [event | {"user_id": "greedy"} if n % 9 == 0 else event for n, event in enumerate(rows)]


def users_that_only_like(random):
    likes = day(DAYS - 1, random, events=120, kinds=("like",), users=4)
    return day(DAYS - 1, random) + [e | {"user_id": f"bot-{e['user_id']}"} for e in likes]


def one_item_liked(random):
    rows = day(DAYS - 1, random)
    return [e | {"item_id": "i0"} if e["kind"] == "like" and n % 3 == 0 else e for n, e in enumerate(rows)]


BAD_DAYS = {
    "volume": lambda random: day(DAYS - 1, random, events=EVENTS // 10),
    "users": lambda random: day(DAYS - 1, random, users=8),
    "items": lambda random: day(DAYS - 1, random, items=5),
    "levels": lambda random: day(DAYS - 1, random, kinds=("like", "like", "impression")),
    "kinds": lambda random: day(
        DAYS - 1, random, kinds=("impression", "impression", "share", "hide", "click")
    ),
    "user": greedy_user,
    "item": one_item_liked,
    "likes_only_users": users_that_only_like,
    "likes_only_client": app_that_sends_only_likes,
    "propensity": lambda random: day(DAYS - 1, random) + served(DAYS - 1, 0.01),
}


@pytest.mark.parametrize("code", BAD_DAYS)
def test_a_bad_day_is_told_by_its_name(tmp_path, code):
    report = found(tmp_path, days(1, BAD_DAYS[code]))
    assert code in {one.code for one in report.breaches}
    assert all(one.words for one in report.breaches)


def test_a_day_without_anything_is_out_of_bounds(tmp_path):
    assert "volume" in {one.code for one in found(tmp_path, days(1, lambda _: [])).breaches}


def test_without_a_past_nothing_is_compared(tmp_path):
    rows = [e for e in days(1, BAD_DAYS["levels"]) if e["arrived_at"] > END - timedelta(days=1)]
    report = found(tmp_path, rows)
    assert (report.compared, report.breaches) == (0, ())


def test_an_empty_log_has_nothing_wrong_with_it(tmp_path):
    report = quality_of(write_snapshot(tmp_path, [], None), CHOSEN)
    assert (report.until, report.breaches) == (None, ())
