"""JSON lines on their way in: mapped, decoded, and every refusal with its line number."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from features.interactions import Interaction, InvalidInteraction, decode_interaction
from features.settings import FeatureSettings

from .mapping import EventMapping


@dataclass(frozen=True)
class Line:
    """One line of the input; exactly one of ``event`` and ``refusal`` is set, neither when it is dropped."""

    number: int
    """From 1, blank lines counted."""
    event: Interaction | None = None
    refusal: InvalidInteraction | None = None


def read_lines(
    lines: Iterable[bytes], settings: FeatureSettings, *, now: datetime, mapping: EventMapping | None = None
) -> Iterator[Line]:
    """Every line that is not blank, by the rules that the ingest workers go by.

    A line has neither event nor refusal when the mapping drops its kind on purpose.
    """
    for number, raw in enumerate(lines, 1):
        raw = raw.strip()
        if not raw:
            continue
        try:
            mapped = raw if mapping is None else mapping.apply(raw)
            if mapped is None:
                yield Line(number)
                continue
            event = decode_interaction(
                mapped, now=now, max_bytes=settings.max_event_bytes, earliest=settings.earliest_event
            )
            yield Line(number, event=event)
        except InvalidInteraction as refusal:
            yield Line(number, refusal=refusal)
