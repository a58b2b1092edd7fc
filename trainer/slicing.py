"""Slices of the gate users and of the catalogue: who must not pay for a gain (policies/gate/slices).

New and heavy users by the length of the history in their prompt; young items by when they first came into the
catalogue; deciles of popularity by the reference's own order of the eligible items, 10 the most popular.
"""

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt

from policies.settings import GateSettings

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DECILES = 10
MOST = 0.5
"""Young items are no slice where they are more than this share of the catalogue: it was just loaded."""


def user_slices(lengths: Sequence[int], settings: GateSettings) -> dict[str, Bools]:
    """Slice -> bool [users], from the number of items in each user's history."""
    history = np.array(lengths, dtype=np.int64)
    return {
        "new users": history <= settings.new_history,
        "heavy users": history >= settings.heavy_history,
    }


def item_slices(
    popularity: Sequence[str],
    eligible: Collection[str],
    first_loaded: Mapping[str, datetime],
    *,
    now: datetime | None,
    settings: GateSettings,
) -> dict[str, frozenset[str]]:
    """Slice -> items. ``popularity``: item ids, most popular first; ``now``: the log's watermark."""
    allowed = set(eligible)
    order = [item for item in popularity if item in allowed]
    order += sorted(allowed - set(order))
    found = {}
    if now is not None:
        since = now - timedelta(days=settings.young_days)
        young = frozenset(item for item in order if item in first_loaded and first_loaded[item] > since)
        if 0 < len(young) <= MOST * len(order):
            found["young items"] = young
    for decile in range(DECILES, 0, -1):
        first, last = ((DECILES - one) * len(order) // DECILES for one in (decile, decile - 1))
        found[f"popularity decile {decile}"] = frozenset(order[first:last])
    return found


def sliced(
    metric: str,
    cases: Sequence[tuple[str, str]],
    values: Sequence[float],
    parts: Mapping[str, Collection[str]],
    users: Sequence[str],
) -> dict[str, Floats]:
    """``metric/slice`` -> float64 [users]: the mean of each user's ``values`` over the (item, user) ``cases``
    whose item is in the slice, NaN without one. Slices without a case are left out."""
    row = {user: place for place, user in enumerate(users)}
    owner = np.array([row.get(user, -1) for _, user in cases], dtype=np.int64)
    figures = np.array(values, dtype=np.float64)
    found = {}
    for name, items in parts.items():
        inside = np.array([item in items for item, _ in cases], dtype=bool) & (owner >= 0)
        if not inside.any():
            continue
        counts = np.bincount(owner[inside], minlength=len(users))
        sums = np.bincount(owner[inside], weights=figures[inside], minlength=len(users))
        found[f"{metric}/{name}"] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return found
