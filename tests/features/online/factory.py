"""A real, tiny online store for tests: a Feast repository with the users that a test names."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.online.definitions import USER_PUSH
from features.online.repository import open_store
from features.settings import OnlineSettings

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def push_histories(folder: Path, histories: Mapping[str, Sequence[str]], *, at: datetime = EPOCH) -> Any:
    """Push users whose whole history is liked and seen; returns the Feast store."""
    import pandas as pd

    store = open_store(folder, OnlineSettings())
    rows = [
        {
            "user_id": user,
            "item_ids": list(items),
            "item_levels": ["liked"] * len(items),
            "item_times": list(range(len(items))),
            "seen_ids": sorted(set(items)),
            "disliked": 0,
            "neutral": 0,
            "liked": len(items),
            "events": len(items),
            "first_at": 0,
            "last_at": len(items),
            "known_at": at,
            "created_at": at,
        }
        for user, items in histories.items()
    ]
    store.push(USER_PUSH, pd.DataFrame(rows))
    return store
