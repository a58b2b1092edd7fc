"""The definitions of level in force, history and preference sample, as plain and slow as they can be said.

Written from the definitions and from nothing else: no SQL, no windows, every question asked of all events
again. Events are dicts with the log's columns.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.log import LOG_SCHEMA, LogSnapshot

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
EXPLICIT = {"like", "dislike", "hide", "share", "purchase", "rating", "review", "comment"}
STRENGTH = {1: 2, -1: 1, 0: 0}


def landing(event):
    return event["landed_at"], event["kafka_partition"], event["kafka_offset"]


def order(event):
    return event["occurred_at"], landing(event)


def once(rows, unsigned=False):
    """Each (user, event_id) at its first landing, without what we did not sign."""
    kept = {}
    for event in sorted(rows, key=landing):
        if unsigned or event["signed"] is not False:
            kept.setdefault((event["user_id"], event["event_id"]), event)
    return list(kept.values())


def level_in_force(events, user, item, watermark, window):
    """(level, deciding event) or None."""
    mine = [e for e in events if e["user_id"] == user and e["item_id"] == item]
    explicit = [e for e in mine if e["kind"] in EXPLICIT and e["level"] is not None]
    if explicit:
        latest = max(explicit, key=order)
        return latest["level"], latest
    telling = []
    for e in mine:
        if e["level"] is None or e["kind"] == "served":
            continue
        if e["kind"] == "impression":
            closed = watermark is not None and e["arrived_at"] + window <= watermark
            answered = any(
                o["kind"] in EXPLICIT | {"click", "dwell"}
                and e["occurred_at"] <= o["occurred_at"] <= e["occurred_at"] + window
                for o in mine
            )
            if not closed or answered:
                continue
        telling.append(e)
    if not telling:
        return None
    strongest = max(telling, key=lambda e: (STRENGTH[e["level"]], order(e)))
    return strongest["level"], strongest


def of_each_user(events):
    """user -> that user's events: nobody's feedback says anything about another's."""
    mine = {}
    for event in events:
        mine.setdefault(event["user_id"], []).append(event)
    return mine


def all_in_force(events, watermark, window):
    found = {
        (user, item): level_in_force(mine, user, item, watermark, window)
        for user, mine in of_each_user(events).items()
        for item in sorted({e["item_id"] for e in mine})
    }
    return {pair: decided for pair, decided in found.items() if decided is not None}


def engaged(event):
    taken_up = event["kind"] in {"click", "rating", "review", "purchase"} and event["level"] != -1
    return event["kind"] != "served" and (event["level"] == 1 or taken_up)


def distinct_latest(item_ids):
    """Every item at its latest place."""
    return [item for place, item in enumerate(item_ids) if item not in item_ids[place + 1 :]]


def history_of(events, user, before, landed_before, without, look_back, length):
    """``before``: occurred strictly before; ``landed_before``: a landing, or None for no such bound."""
    mine = [e for e in events if e["user_id"] == user and engaged(e) and e["occurred_at"] < before]
    looked_at = sorted(mine, key=order)[-look_back:]
    known = [e for e in looked_at if landed_before is None or landing(e) < landed_before]
    return [item for item in distinct_latest([e["item_id"] for e in known]) if item not in without][-length:]


def slate_asked(events, user, request):
    """(asked_at, landing) of the first served record of a slate."""
    served = [e for e in events if is_served(e, user, request)]
    return min(e["occurred_at"] for e in served), min(landing(e) for e in served)


def is_served(event, user, request):
    return event["kind"] == "served" and event["user_id"] == user and event["request_id"] == request


def asked(events, user, item, like, window):
    """(asked_at, landing or None, request or None, served record of the item or None)."""
    mine = [e for e in events if e["user_id"] == user and e["item_id"] == item]
    request = like["request_id"]
    if request is None:
        shown = [
            e
            for e in mine
            if e["kind"] == "impression"
            and e["request_id"] is not None
            and like["occurred_at"] - window <= e["occurred_at"] <= like["occurred_at"]
        ]
        if shown:
            request = max(shown, key=order)["request_id"]
    served = [e for e in mine if request is not None and is_served(e, user, request)]
    if not served:
        return min(e["occurred_at"] for e in mine), None, request, None
    return *slate_asked(events, user, request), request, min(served, key=landing)


def samples(rows, settings, watermark, level, since=None):
    """Rows of one stage, without sample_id and role; and how many likes had no negative."""
    kept, no_negative = [], 0
    for events in of_each_user(once(rows)).values():
        made, refused = samples_of_user(events, settings, watermark, level, since)
        cap = settings.dataset.max_samples_per_user
        kept += [sample for at, sample in made if sum(other > at for other, _ in made) < cap]
        no_negative += refused
    return sorted(kept, key=lambda sample: (sample["user_id"], sample["chosen"])), no_negative


def samples_of_user(events, settings, watermark, level, since):
    window = timedelta(seconds=settings.attribution_window_s)
    forced = all_in_force(events, watermark, window)
    made, no_negative = [], 0
    for (user, item), (liked, like) in forced.items():
        if liked != 1 or (since is not None and like["arrived_at"] <= since):
            continue
        asked_at, landed, request, served = asked(events, user, item, like, window)
        negatives = [
            (order(decided), i) for (u, i), (its, decided) in forced.items() if u == user and its == level
        ]
        slate = {
            e["item_id"]
            for e in events
            if e["user_id"] == user and request is not None and e["request_id"] == request
        }
        latest_first = sorted(negatives, reverse=True)
        same_slate = [i for _, i in latest_first if i in slate]
        earlier = [i for at, i in latest_first if i not in slate and at < order(like)]
        rejected = (same_slate + earlier)[: settings.max_rejected]
        if not rejected:
            no_negative += 1
            continue
        made.append(
            (
                order(like),
                {
                    "user_id": user,
                    "history": history_of(
                        events,
                        user,
                        asked_at,
                        landed,
                        {item, *rejected},
                        settings.history_look_back,
                        settings.history_length,
                    ),
                    "chosen": item,
                    "rejected": rejected,
                    "asked_at": asked_at,
                    "request_id": request,
                    "policy_version": served and served["policy_version"],
                    "propensity": served and served["propensity"],
                },
            )
        )
    return made, no_negative


def write_snapshot(folder: Path, rows, watermark, version=0):
    """A snapshot of the log with exactly these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if rows:
        day = folder / "landed_on=2026-01-01"
        day.mkdir(exist_ok=True)
        stored = pa.Table.from_pylist(rows, schema=LOG_SCHEMA).drop_columns(["landed_on"])
        pq.write_table(stored, day / f"part-{version}.parquet")
        files = [str(day / f"part-{version}.parquet")]
    return LogSnapshot(version=version, files=files, watermark=watermark, schema=LOG_SCHEMA)


_LEVELS = {"like": 1, "share": 1, "purchase": 1, "dislike": -1, "hide": -1, "impression": 0}


def row(kind, item="a", user="u", *, at=0.0, landed=None, delay=0.0, offset=0, level=None, **columns):
    """One row of the log. ``at``: minutes since EPOCH; it arrives ``delay`` minutes later, lands at once."""
    occurred = EPOCH + timedelta(minutes=at)
    arrived = occurred + timedelta(minutes=delay)
    landed_at = arrived if landed is None else EPOCH + timedelta(minutes=landed)
    return {
        "event_id": f"{kind}-{user}-{item}-{at}-{offset}",
        "user_id": user,
        "item_id": item,
        "kind": kind,
        "occurred_at": occurred,
        "level": _LEVELS.get(kind) if level is None else level,
        "rules": "r",
        "request_id": None,
        "position": None,
        "policy_version": None,
        "propensity": None,
        "value": None,
        "text": None,
        "source": None,
        "schema_version": "1.0",
        "extra": None,
        "signed": None,
        "arrived_at": arrived,
        "landed_at": landed_at,
        "landed_on": landed_at.date(),
        "kafka_partition": 0,
        "kafka_offset": offset,
        **columns,
    }
