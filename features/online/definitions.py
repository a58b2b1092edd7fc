"""Feast definitions: entities user and item, their feature views, and the service a prompt needs.

A view's value is always whole (never a delta), so a push may be repeated. ``known_at`` is the instant from
which a value was known: one microsecond after its last event landed, which makes Feast's inclusive
point-in-time join strict.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

KNOWN_AT = "known_at"
CREATED_AT = "created_at"
USER_PUSH = "user_values"
ITEM_PUSH = "item_values"
CONTEXT_SERVICE = "recommendation_context"
USER_EXPORT = "users"
ITEM_EXPORT = "items"

USER_VIEWS: dict[str, dict[str, str]] = {
    "user_history": {"item_ids": "strings", "item_levels": "strings", "item_times": "integers"},
    "user_seen": {"seen_ids": "strings"},
    "user_levels": {"disliked": "integer", "neutral": "integer", "liked": "integer"},
    "user_profile": {"events": "integer", "first_at": "integer", "last_at": "integer"},
}
"""View -> feature -> type. Times are microseconds since 1970 UTC (Feast's timestamps keep seconds only)."""

ITEM_VIEWS: dict[str, dict[str, str]] = {
    "item_feedback": {
        "item_disliked": "integer",
        "item_neutral": "integer",
        "item_liked": "integer",
        "item_events": "integer",
        "item_last_at": "integer",
    },
}
"""What the log holds on an item: events by their own level (not levels in force), all events, the latest."""

CONTEXT_VIEWS = ("user_history", "user_seen")


@dataclass(frozen=True)
class Definitions:
    """Everything ``FeatureStore.apply`` needs, in one order that works."""

    objects: tuple[Any, ...]


def definitions(exports: Path) -> Definitions:
    """Build the Feast objects; history is read from Parquet in ``exports/users`` and ``exports/items``."""
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
    from feast.types import Array, Int64, String

    types = {"strings": Array(String), "integers": Array(Int64), "integer": Int64}

    def push_source(name: str, folder: str) -> Any:
        batch = FileSource(
            name=f"{name}_past",
            path=str(exports / folder / "*.parquet"),
            file_format=_parquet(),
            timestamp_field=KNOWN_AT,
            created_timestamp_column=CREATED_AT,
        )
        return PushSource(name=name, batch_source=batch)

    def views(entity: Any, source: Any, described: dict[str, dict[str, str]]) -> list[Any]:
        return [
            FeatureView(
                name=name,
                entities=[entity],
                schema=[Field(name=feature, dtype=types[kind]) for feature, kind in features.items()],
                source=source,
                online=True,
            )
            for name, features in described.items()
        ]

    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)
    of_users, of_items = push_source(USER_PUSH, USER_EXPORT), push_source(ITEM_PUSH, ITEM_EXPORT)
    user_views, item_views = views(user, of_users, USER_VIEWS), views(item, of_items, ITEM_VIEWS)
    service = FeatureService(
        name=CONTEXT_SERVICE, features=[view for view in user_views if view.name in CONTEXT_VIEWS]
    )
    return Definitions((user, item, of_users, of_items, *user_views, *item_views, service))


def _parquet() -> Any:
    from feast.data_format import ParquetFormat

    return ParquetFormat()
