"""Feedback that is stored and not learned from: each such row of a snapshot with its mark.

Marks are found when the log is read, never written into it: a served record that lands late, a corrected
setting or a found key changes what is believed without rewriting a row.
"""

import pyarrow as pa

from .duck import connect
from .events import number
from .log import LogSnapshot
from .queries import fetch
from .settings import FeatureSettings

MARKED_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string()),
        pa.field("event_id", pa.string()),
        pa.field("item_id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
        pa.field("landed_at", pa.timestamp("us", "UTC")),
        pa.field("mark", pa.string()),
    ]
)
"""One row of the log a row, by user and landing; ``mark``: unsigned, cross_user, replayed, off_slate,
position, organic, user_cap or request_cap."""


def marked_feedback(snapshot: LogSnapshot, settings: FeatureSettings) -> pa.Table:
    """Rows of ``snapshot`` that are not learned from under ``settings``. Columns as in MARKED_SCHEMA."""
    with connect(settings) as con:
        number(con, snapshot, settings)
        found = fetch(con, "events_marks_named", {"unsigned": settings.dataset.learn_from_unsigned})
    return found.cast(MARKED_SCHEMA)
