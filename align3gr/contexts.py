"""What a policy is asked with: users' contexts as the log knows them now, and what it may answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from features.catalogue import Catalogue, CatalogueMissing
from features.duck import connect
from features.histories import items_of_users, recent_histories, seen
from features.log import FeedbackLog
from policies.policy import UserContext

if TYPE_CHECKING:
    from align3gr.settings import Settings


def contexts_of(settings: "Settings", users: Sequence[str]) -> tuple[list[UserContext], list[str]]:
    """Contexts in the order of ``users``, and those of them that nobody knows. Raises LogMissing."""
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    history: dict[str, list[str]] = {}
    met: dict[str, list[str]] = {}
    if snapshot.files:
        with connect(settings.features) as con:
            history = items_of_users(recent_histories(con, snapshot, settings.features, user_ids=users))
            met = items_of_users(seen(con, snapshot, users))
    contexts = [UserContext(u, tuple(history.get(u, ())), frozenset(met.get(u, ()))) for u in users]
    return contexts, [user for user in users if user not in met]


def listed_titles(settings: "Settings") -> tuple[dict[str, str], list[str] | None]:
    """Titles, and the items that may be recommended; without a catalogue all of the codec's may."""
    try:
        items = Catalogue.open(settings.home / "catalogue", create=False).items()
    except CatalogueMissing:
        return {}, None
    ids = items["item_id"].to_pylist()
    return dict(zip(ids, items["title"].to_pylist(), strict=True)), ids
