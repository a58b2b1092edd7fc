"""The same preference datasets with pandas, said directly: what a careful person would write first.

Columns at a time where pandas can (deduplication, levels in force, requests), a loop over the likes of each
user where it cannot (histories and rejected items of two clocks).
"""

from bisect import bisect_left
from datetime import datetime, timedelta

import pandas as pd
import pyarrow.parquet as pq

from features.events import ANSWERING_KINDS, ENGAGING_KINDS
from features.levels import EXPLICIT_KINDS
from features.settings import FeatureSettings

PAIR = ["user_id", "item_id"]
COLUMNS = [
    *("event_id", "user_id", "item_id", "kind", "occurred_at", "level", "request_id", "policy_version"),
    *("propensity", "signed", "arrived_at", "landed_at", "kafka_partition", "kafka_offset"),
]
STAGES = {"easy": -1, "hard": 0}


def samples(files: list[str], settings: FeatureSettings, watermark: datetime) -> dict[str, list[tuple]]:
    """Rows (user, history, chosen, rejected, asked_at, request, policy, propensity) by stage, sorted."""
    events = _once(pd.concat(pq.read_table(file, columns=COLUMNS).to_pandas() for file in files))
    forced = _in_force(events, settings, watermark)
    likes = _asked(events, forced[forced.level == 1], settings)
    return _rows(events, forced, likes, settings)


def _once(log: pd.DataFrame) -> pd.DataFrame:
    """Each event at its first landing; ``seq`` orders by landing, ``n`` by occurrence."""
    log = log[log.signed.ne(False)].sort_values(["landed_at", "kafka_partition", "kafka_offset"])
    log = log.drop_duplicates(["user_id", "event_id"])
    log["seq"] = range(len(log))
    log = log.sort_values(["occurred_at", "seq"])
    log["n"] = range(len(log))
    return log


def _in_force(events: pd.DataFrame, settings: FeatureSettings, watermark: datetime) -> pd.DataFrame:
    window = timedelta(seconds=settings.attribution_window_s)
    telling = events[events.level.notna() & (events.kind != "served")]
    impressions = telling[(telling.kind == "impression") & (telling.arrived_at + window <= watermark)]
    answers = events.loc[events.kind.isin(ANSWERING_KINDS), [*PAIR, "occurred_at"]].assign(answered=True)
    joined = pd.merge_asof(
        impressions, answers, on="occurred_at", by=PAIR, direction="forward", tolerance=window
    )
    telling = pd.concat([telling[telling.kind != "impression"], joined[joined.answered.isna()]])
    strength = telling.level.map({1: 2, -1: 1, 0: 0}).mask(telling.kind.isin(EXPLICIT_KINDS), 3)
    ranked = telling.assign(strength=strength).sort_values(["strength", "n"])
    return ranked.drop_duplicates(PAIR, keep="last").sort_values("n")


def _asked(events: pd.DataFrame, likes: pd.DataFrame, settings: FeatureSettings) -> pd.DataFrame:
    """The likes with their request, and when it was asked for on both clocks."""
    window = timedelta(seconds=settings.attribution_window_s)
    shown = events.loc[
        (events.kind == "impression") & events.request_id.notna(), [*PAIR, "occurred_at", "request_id"]
    ].rename(columns={"request_id": "shown_in"})
    facts = ["policy_version", "propensity"]
    likes = likes.drop(columns=facts).sort_values("occurred_at")
    likes = pd.merge_asof(likes, shown, on="occurred_at", by=PAIR, tolerance=window)
    likes["request_id"] = likes.request_id.fillna(likes.pop("shown_in"))
    first = events.groupby(PAIR, as_index=False).agg(first_met=("occurred_at", "min"))
    served = events[(events.kind == "served") & events.request_id.notna()].sort_values("seq")
    key = ["user_id", "request_id"]
    slates = served.groupby(key, as_index=False).agg(
        slate_at=("occurred_at", "min"), asked_seq=("seq", "min")
    )
    on_slate = served.drop_duplicates([*key, "item_id"])[[*key, "item_id", *facts]].merge(slates, on=key)
    likes = likes.merge(first, on=PAIR).merge(on_slate, on=[*key, "item_id"], how="left")
    likes["asked_at"] = likes.slate_at.fillna(likes.first_met)
    return likes


def _rows(
    events: pd.DataFrame, forced: pd.DataFrame, likes: pd.DataFrame, settings: FeatureSettings
) -> dict[str, list[tuple]]:
    engaged = events[(events.level == 1) | (events.kind.isin(ENGAGING_KINDS) & (events.level != -1))]
    taken = {
        user: (list(mine.occurred_at), list(mine.item_id), list(mine.seq))
        for user, mine in engaged.groupby("user_id")
    }
    negatives = {
        (user, level): (list(mine.n), list(mine.item_id))
        for (user, level), mine in forced[forced.level != 1].groupby(["user_id", "level"])
    }
    touched = events.loc[events.request_id.notna(), ["user_id", "request_id", "item_id"]].drop_duplicates()
    judged = touched.merge(forced.loc[forced.level != 1, [*PAIR, "level", "n"]], on=PAIR)
    slates = {
        key: list(mine.item_id)
        for key, mine in judged.sort_values("n", ascending=False).groupby(["user_id", "request_id", "level"])
    }
    rows: dict[str, list[tuple]] = {stage: [] for stage in STAGES}
    nothing: tuple[list, ...] = ([], [], [])
    for like in likes.itertuples():
        times, items, landed = taken.get(like.user_id, nothing)
        upto = bisect_left(times, like.asked_at)
        known = [
            items[place]
            for place in range(max(0, upto - settings.history_look_back), upto)
            if pd.isna(like.asked_seq) or landed[place] < like.asked_seq
        ]
        for stage, level in STAGES.items():
            decided, others = negatives.get((like.user_id, level), nothing[:2])
            same_slate = slates.get((like.user_id, like.request_id, level), [])
            upto = bisect_left(decided, like.n)
            recent = reversed(others[max(0, upto - settings.max_rejected) : upto])
            rejected = (same_slate + [item for item in recent if item not in same_slate])[
                : settings.max_rejected
            ]
            if not rejected:
                continue
            without = {like.item_id, *rejected}
            latest_first = dict.fromkeys(item for item in reversed(known) if item not in without)
            history = list(latest_first)[: settings.history_length][::-1]
            facts = (like.asked_at, like.request_id, like.policy_version, like.propensity)
            rows[stage].append((like.user_id, history, like.item_id, rejected, *facts))
    return {stage: sorted(found, key=lambda row: (row[0], row[2])) for stage, found in rows.items()}
