"""Drift and data quality: the log's last period against the trailing ones, and what left its bounds.

One idea: figures by period (five small answers over one scan), bounds as pure functions of these figures. A
bound that needs a past is silent until there is one; a breach has a code, what it is about, and a sentence.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from statistics import median
from typing import Any

from .duck import connect, view_of
from .log import LogSnapshot
from .queries import execute, fetch
from .settings import FeatureSettings, QualitySettings

LEVELS = ("liked", "neutral", "disliked", "unlevelled")
_ENOUGH_LEVELS = 50
"""A client with fewer levels in the period is not said to send only likes."""
_EVEN = 5.0
"""Where users are few, one of them may hold so many times an even share."""


@dataclass(frozen=True)
class Breach:
    """One bound that the data left."""

    code: str
    """volume, users, items, levels, kinds, user, item, likes_only_users, likes_only_client or propensity."""
    about: str
    """The user, item or client it is about; empty where it is about the period."""
    words: str


@dataclass(frozen=True)
class QualityReport:
    """What the last period looks like, and what is wrong with it."""

    log_version: int
    until: datetime | None
    """End of the last period: the watermark. None: nothing has landed."""
    periods: tuple[dict[str, Any], ...]
    """Figures of each period that holds anything, the latest (0) first."""
    compared: int
    """Trailing periods with enough events to compare with; below ``min_periods`` nothing was compared."""
    breaches: tuple[Breach, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "until": None if self.until is None else self.until.isoformat()}


@dataclass(frozen=True)
class Figures:
    """What was counted, as the bounds read it."""

    periods: tuple[dict[str, Any], ...]
    kinds: tuple[dict[str, Any], ...]
    clients: tuple[dict[str, Any], ...]
    risen: dict[str, Any] | None
    """The item whose share of the likes rose most."""


def quality_of(snapshot: LogSnapshot, settings: FeatureSettings) -> QualityReport:
    """Measure ``snapshot`` and hold it against ``settings.quality``: one scan and sums over it."""
    chosen = settings.quality
    with connect(settings) as con:
        view_of(con, "log", snapshot)
        until = snapshot.watermark
        if until is None:
            ((until,),) = con.execute("select max(arrived_at) from log").fetchall()
        if until is None:
            return QualityReport(snapshot.version, None, (), 0, ())
        values = {"until": until, "period_us": round(chosen.period_s * 1e6), "trailing": chosen.trailing}
        execute(con, "quality_events", values)
        found = {name: fetch(con, f"quality_{name}", {}).to_pylist() for name in _ANSWERS}
    risen = found["items"][0] if found["items"] else None
    figures = Figures(tuple(found["periods"]), tuple(found["kinds"]), tuple(found["clients"]), risen)
    breaches = tuple(judge(figures, chosen))
    return QualityReport(
        snapshot.version, until, figures.periods, len(_enough(figures.periods, chosen)), breaches
    )


def judge(figures: Figures, bounds: QualitySettings) -> Iterator[Breach]:
    """Every bound that the last period left."""
    now = next((one for one in figures.periods if one["period"] == 0), None)
    trailing = _enough(figures.periods, bounds)
    compared = len(trailing) >= bounds.min_periods
    if compared:
        yield from _volume(now, trailing, bounds)
    if now is None or now["events"] < bounds.min_events:
        return
    yield from _busiest(now, bounds)
    if compared:
        yield from _shifts(now, trailing, figures, bounds)
        yield from _likes_only(now, trailing, figures, bounds)
        yield from _propensities(now, trailing, bounds)


_ANSWERS = ("periods", "kinds", "items", "clients")


def _enough(periods: tuple[dict[str, Any], ...], bounds: QualitySettings) -> list[dict[str, Any]]:
    return [one for one in periods if one["period"] > 0 and one["events"] >= bounds.min_events]


def _volume(
    now: dict[str, Any] | None, trailing: list[dict[str, Any]], bounds: QualitySettings
) -> Iterator[Breach]:
    for code, name in (("volume", "events"), ("users", "users"), ("items", "items")):
        usual, found = median(one[name] or 0 for one in trailing), (now or {}).get(name) or 0
        if found < bounds.least_volume * usual or found > bounds.most_volume * usual:
            yield Breach(code, "", f"{found} {name} in the last period, {usual:g} are usual")


def _busiest(now: dict[str, Any], bounds: QualitySettings) -> Iterator[Breach]:
    share = now["most_of_user"] / now["events"]
    if share >= max(bounds.most_of_user, min(1.0, _EVEN / now["users"])):
        words = f"user {now['busiest']} sent {share:.0%} of the last period's events"
        yield Breach("user", now["busiest"], words)


def _shifts(
    now: dict[str, Any], trailing: list[dict[str, Any]], figures: Figures, bounds: QualitySettings
) -> Iterator[Breach]:
    before = {name: sum(one[name] for one in trailing) for name in LEVELS}
    shift, most = _shift({name: now[name] for name in LEVELS}, before)
    if shift > bounds.most_shift:
        yield Breach("levels", "", f"the shares of levels moved by {shift:.0%}, most of all {most}")
    shift, most = _shift(
        {one["kind"]: one["now"] for one in figures.kinds},
        {one["kind"]: one["before"] for one in figures.kinds},
    )
    if shift > bounds.most_shift:
        yield Breach("kinds", "", f"the shares of kinds moved by {shift:.0%}, most of all {most}")
    risen = figures.risen
    if risen is not None and risen["now"] is not None and now["liked"] >= _ENOUGH_LEVELS:
        gain = risen["now"] - (risen["before"] or 0.0)
        if gain > bounds.most_gain_of_item and not math.isnan(gain):
            words = (
                f"item {risen['item_id']} has {risen['now']:.0%} of the likes, {gain:.0%} more than before"
            )
            yield Breach("item", risen["item_id"], words)


def _likes_only(
    now: dict[str, Any], trailing: list[dict[str, Any]], figures: Figures, bounds: QualitySettings
) -> Iterator[Breach]:
    before = sum(one["likes_only"] for one in trailing) / max(sum(one["users"] for one in trailing), 1)
    share = now["likes_only"] / now["users"]
    if share - before > bounds.most_likes_only:
        words = f"{share:.1%} of the users send nothing but likes, {before:.1%} did before"
        yield Breach("likes_only_users", "", words)
    for one in figures.clients:
        big = one["events"] >= bounds.likes_only_client * now["events"] and one["levels"] >= _ENOUGH_LEVELS
        did = one["levels_before"] > 0 and one["likes_before"] == one["levels_before"]
        if big and one["likes"] == one["levels"] and not did:
            words = f"client {one['client']} sends nothing but likes ({one['likes']} of them)"
            yield Breach("likes_only_client", one["client"], words)


def _propensities(
    now: dict[str, Any], trailing: list[dict[str, Any]], bounds: QualitySettings
) -> Iterator[Breach]:
    told = [one for one in trailing if one["mean_propensity"]]
    if not told or not now["served"]:
        return
    usual, found = median(one["mean_propensity"] for one in told), now["mean_propensity"]
    if found is None:
        words = f"no served record carries a propensity; before, {usual:.3g} was the mean"
        yield Breach("propensity", "", words)
    elif not usual / bounds.propensity_factor <= found <= usual * bounds.propensity_factor:
        yield Breach("propensity", "", f"the mean propensity is {found:.3g}, {usual:.3g} is usual")


def _shift(now: dict[str, int], before: dict[str, int]) -> tuple[float, str]:
    """Total variation distance of two sets of counts, and what moved most, in words."""
    totals = max(sum(now.values()), 1), max(sum(before.values()), 1)
    moved = {name: now[name] / totals[0] - before[name] / totals[1] for name in now}
    most = max(moved, key=lambda name: abs(moved[name]))
    words = f"{most} from {before[most] / totals[1]:.0%} to {now[most] / totals[0]:.0%}"
    return sum(map(abs, moved.values())) / 2, words
