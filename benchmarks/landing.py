"""Landing events in a feedback log without Kafka: as one ingest worker does that reads one partition."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from features.batch import InteractionBatch, Record
from features.interactions import Interaction, encode_interaction
from features.log import FeedbackLog, offsets_app, watermark_app
from features.settings import FeatureSettings


def rows_of(
    events: Iterable[Interaction], settings: FeatureSettings, until: datetime, *, first: int = 0
) -> pa.Table:
    """``events`` as rows of the log that are committed at ``until`` and arrived a second before; ``first``:
    offset of the first one. Raises ValueError for an event that no worker would accept."""
    arrived, batch = int(until.timestamp() * 1000) - 1000, InteractionBatch.of(settings)
    records = [Record(encode_interaction(one), 0, first + n, arrived) for n, one in enumerate(events)]
    refused = batch.add(records, now=until)
    if refused:
        raise ValueError(refused[0].message)
    return batch.table(until)


def land(place: Path, events: Iterable[Interaction], settings: FeatureSettings, until: datetime) -> None:
    """Append ``events`` to the log ``place``, behind what it holds; its watermark is ``until``."""
    log = FeedbackLog.open(place)
    app, mark = (kind("benchmark", "interactions", 0) for kind in (offsets_app, watermark_app))
    last = log.transaction_version(app)
    first = 0 if last is None else last + 1
    rows = rows_of(events, settings, until, first=first)
    log.append(rows, {app: first + rows.num_rows - 1, mark: int(until.timestamp() * 1000)})
