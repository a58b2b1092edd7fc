"""Reads what the online store knows of users: the context of a recommendation prompt.

Feast answers column by column in its own order and with nulls for whom it does not know; here that becomes
one frozen record a user, in the order asked.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings import OnlineSettings
from .definitions import CONTEXT_SERVICE, USER_VIEWS
from .repository import OnlineUnavailable, open_store

if TYPE_CHECKING:
    from feast import FeatureStore


@dataclass(frozen=True)
class UserFeatures:
    """What is known of one user. ``known`` is false for a user without a single landed event."""

    user_id: str
    history: tuple[str, ...] = ()
    """Item ids of the last distinct engaged items, oldest first."""
    seen: frozenset[str] = frozenset()
    """Items with any event but ``served``."""
    levels: tuple[str, ...] = ()
    """Level in force of each item of the history: disliked, neutral, liked, or none."""
    times: tuple[int, ...] = ()
    """When each item of the history was last engaged with (microseconds since 1970 UTC)."""
    known: bool = False


class OnlineFeatures:
    """The server's view of the online store. One reader a process; calls from several threads take turns."""

    def __init__(self, store: "FeatureStore") -> None:
        self._store = store
        self._service = store.get_feature_service(CONTEXT_SERVICE)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, settings: OnlineSettings) -> "OnlineFeatures":
        """Open ``home/online``, creating an empty store where there is none yet."""
        return cls(open_store(folder, settings))

    def contexts(self, user_ids: Sequence[str]) -> list[UserFeatures]:
        """One record a user, in the order of ``user_ids``; an unknown user has an empty one.

        Raises OnlineUnavailable when the store does not answer.
        """
        if not user_ids:
            return []
        columns = self._read(self._service, user_ids)
        return [
            UserFeatures(
                user_id=user_id,
                history=tuple(columns["item_ids"][row] or ()),
                seen=frozenset(columns["seen_ids"][row] or ()),
                levels=tuple(columns["item_levels"][row] or ()),
                times=tuple(columns["item_times"][row] or ()),
                known=columns["seen_ids"][row] is not None,
            )
            for row, user_id in enumerate(user_ids)
        ]

    def everything(self, user_id: str) -> dict[str, Any]:
        """All online features of one user, by name; None for each that the store does not have."""
        references = [f"{view}:{feature}" for view, features in USER_VIEWS.items() for feature in features]
        columns = self._read(references, [user_id])
        return {name: columns[name][0] for features in USER_VIEWS.values() for name in features}

    def _read(self, features: Any, user_ids: Sequence[str]) -> dict[str, list[Any]]:
        try:
            with self._lock:
                answer = self._store.get_online_features(
                    features=features, entity_rows=[{"user_id": user_id} for user_id in user_ids]
                )
            columns: dict[str, list[Any]] = answer.to_dict()
        except Exception as error:
            raise OnlineUnavailable(f"online store cannot be read: {error}; is it reachable?") from error
        return columns
