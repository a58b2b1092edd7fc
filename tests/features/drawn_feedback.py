"""Feedback at its worst, drawn: every order of arrival, ties, repeats, late and forged events."""

import random
from datetime import timedelta

from tests.features.feedback_oracle import EPOCH, row

ITEMS = "abcdef"
KINDS = [
    "served",
    "impression",
    "click",
    "dwell",
    "like",
    "dislike",
    "rating",
    "review",
    "comment",
    "purchase",
]
LEVELS = {
    "dwell": [None, 0, 1],
    "rating": [-1, 0, 1],
    "review": [None, -1, 1],
    "comment": [None, -1],
    "impression": [0, 0, 0, None],
}


def draw_rows(pick: random.Random, users: int, most: int):
    """Rows of up to ``most`` events for each of ``users`` users: few items, few minutes, so that all collide.

    ``pick`` may be hypothesis' own Random: a failing draw is then shrunk.
    """
    rows = []
    for user in range(users):
        rows += _of_user(pick, f"u{user}", pick.randint(1, most))
    return rows


def draw_watermark(pick: random.Random):
    return pick.choice([None, *(EPOCH + timedelta(minutes=m) for m in (20, 45, 60, 120, 1000))])


def _of_user(pick, user, count):
    rows = []
    for number in range(count):
        kind = pick.choice(KINDS)
        requests = [f"{user}-r0", f"{user}-r1"] if kind == "served" else [None, f"{user}-r0", f"{user}-r1"]
        served = kind == "served"
        rows.append(
            row(
                kind,
                pick.choice(ITEMS),
                user,
                at=pick.randint(0, 12) * 5,
                delay=pick.choice([0, 0, 1, 40]),
                event_id=f"e{number}",
                request_id=pick.choice(requests),
                signed=pick.choice([None, True, True, False]),
                policy_version=pick.choice([None, "v1", "v2"]) if served else None,
                propensity=pick.choice([None, 0.25]) if served else None,
            )
        )
        rows[-1]["level"] = pick.choice(LEVELS[kind]) if kind in LEVELS else rows[-1]["level"]
    for event in [event for event in rows if pick.random() < 0.15]:
        rows.append(event | pick.choice([{}, {"signed": None}, {"kind": "like", "level": 1}]))
    pick.shuffle(rows)
    restarted = pick.randint(0, len(rows))  # from here on a new topic, whose offsets start at zero again
    for place, event in enumerate(rows):
        event["kafka_partition"] = pick.choice([0, 0, 1]) if place < restarted else 0
        event["kafka_offset"] = place if place < restarted else place - restarted
        event["landed_at"] = EPOCH + timedelta(
            hours=2, seconds=place // 3 + (60 if place >= restarted else 0)
        )
    return rows
