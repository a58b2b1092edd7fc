"""Commands: schema, validate, produce, replay."""

import gzip
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager

    from align3gr.settings import Settings
    from ingest.importers import Dataset
    from ingest.lines import Line
    from ingest.producer import DeliveryReport

app = typer.Typer()

_SHOWN = 20
"""Refusals that are printed line by line; all are counted."""

_FILE = typer.Argument(help="JSON lines, one event each; - reads standard input; .gz is unpacked.")
_MAPPING = typer.Option(None, "--mapping", help="YAML file from your names of kinds and fields to ours.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of an interaction event."""
    import json

    from features import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def validate(
    context: typer.Context,
    file: str = _FILE,
    mapping: Path | None = _MAPPING,
    as_json: bool = JsonOption,
) -> None:
    """Say which events would be refused and why; nothing is sent. Exit code 2 when there is one."""
    from collections import Counter

    from features.errors import BadInput

    reasons: Counter[str] = Counter()
    problems: list[dict[str, Any]] = []
    accepted = dropped = 0
    for line in _lines(file, mapping, settings_of(context)):
        if line.refusal is not None:
            reasons[line.refusal.reason] += 1
            problem = {"line": line.number, "reason": line.refusal.reason, "message": str(line.refusal)}
            if as_json:
                problems.append(problem)
            elif sum(reasons.values()) <= _SHOWN:
                typer.echo(f"line {line.number}: {line.refusal}")
        elif line.event is not None:
            accepted += 1
        else:
            dropped += 1
    refused = sum(reasons.values())
    facts = {"accepted": accepted, "refused": refused, "dropped": dropped, "reasons": dict(reasons)}
    emit(facts | ({"problems": problems} if as_json else {}), as_json)
    if refused:
        raise BadInput(f"{refused} of {refused + accepted} events would be refused; nothing was sent")


@app.command()
def produce(
    context: typer.Context,
    file: str = _FILE,
    mapping: Path | None = _MAPPING,
    as_json: bool = JsonOption,
) -> None:
    """Publish the events of FILE. Those that cannot be accepted are reported and left out (exit code 2)."""
    from features.errors import BadInput
    from ingest.producer import FeedbackProducer

    settings = settings_of(context)
    sent = refused = 0
    first = ""
    with (
        FeedbackProducer(settings.kafka) as producer,
        _progress("events", None, quiet=as_json) as advance,
    ):
        for line in _lines(file, mapping, settings):
            if line.refusal is not None:
                refused += 1
                first = first or f"line {line.number}: {line.refusal}"
            elif line.event is not None:
                producer.send(line.event)
                sent += 1
                if sent % 1000 == 0:
                    advance(sent)
        advance(sent)
        report = producer.flush()
    emit(_delivered(sent, report) | {"refused": refused}, as_json)
    _require_delivery(report, sent)
    if refused:
        raise BadInput(f"{refused} events were refused and not sent, first {first}; see align3gr validate")


@app.command()
def replay(
    context: typer.Context,
    dataset: str = typer.Argument(help="movielens, amazon, yelp or sequences."),
    path: Path = typer.Argument(help="The published file, or the folder it lies in."),
    k_core: int = typer.Option(1, "--k-core", min=1, help="Keep users and items with at least N events."),
    leave_out: int = typer.Option(0, "--leave-out", min=0, help="Keep back the last N events of every user."),
    held_out: Path | None = typer.Option(None, "--held-out", help="File that those are written to."),
    speed: float | None = typer.Option(
        None, "--speed", help="Seconds of the data's time in one of ours (default: as fast as it goes)."
    ),
    limit: int | None = typer.Option(None, "--limit", min=1, help="Only the first N events."),
    catalogue: bool = typer.Option(True, help="Also load what the dataset says about its items."),
    allow_no_text: bool = typer.Option(False, help="Load items without title and text too."),
    as_json: bool = JsonOption,
) -> None:
    """Publish a published dataset as a stream of interactions, in the order in which they happened."""
    from features.errors import BadInput
    from ingest import replay as replaying
    from ingest.importers import interactions, read_dataset
    from ingest.producer import FeedbackProducer

    if bool(leave_out) != (held_out is not None):
        raise BadInput("--leave-out N and --held-out FILE belong together: give both or none")
    if speed is not None and not speed > 0:
        raise BadInput("--speed must be above 0")
    settings = settings_of(context)
    read = read_dataset(dataset, path)
    split = replaying.leave_out(replaying.k_core(read.events, k_core), leave_out)
    events = split.replayed if limit is None else split.replayed.slice(0, limit)
    if not events.num_rows:
        raise BadInput(f"no event of {path} is left after --k-core {k_core}; nothing was sent")
    with FeedbackProducer(settings.kafka) as producer:  # an unreachable broker is said before anything else
        facts: dict[str, Any] = {"dataset": dataset, "events": events.num_rows}
        if held_out is not None:
            try:
                facts["held_out"] = replaying.write_held_out(held_out, split.held_out, read.source)
            except OSError as error:
                raise BadInput(f"{held_out} cannot be written: {error.strerror}; nothing was sent") from error
        if catalogue:
            facts |= _load_items(settings, read, allow_no_text)
        stream = interactions(events, read.source)
        with _progress(f"replay {dataset}", events.num_rows, quiet=as_json) as advance:
            sent = replaying.replay(stream, producer, speed=speed, progress=advance)
            report = producer.flush()
    emit(facts | _delivered(sent, report), as_json)
    _require_delivery(report, sent)


def _load_items(settings: "Settings", read: "Dataset", allow_no_text: bool) -> dict[str, Any]:
    """Load the dataset's items; those without a word are left out, and said, unless allowed."""
    from datetime import UTC, datetime

    from features.catalogue import Catalogue

    if not read.items:
        say("the dataset says nothing about its items; load a catalogue with: align3gr catalogue load FILE")
        return {"catalogue_items": 0}
    worded = [item for item in read.items if item.title.strip() or item.text.strip()]
    items = read.items if allow_no_text else worded
    left_out = len(read.items) - len(items)
    if left_out:
        say(f"{left_out} items have neither title nor text and stay out of the catalogue (--allow-no-text)")
    if not items:
        return {"catalogue_items": 0, "items_without_text": left_out}
    report = Catalogue.open(settings.home / "catalogue").load(
        items, now=datetime.now(UTC), allow_no_text=allow_no_text
    )
    return {"catalogue_items": report.items, "items_without_text": len(read.items) - len(worded)}


def _delivered(sent: int, report: "DeliveryReport") -> dict[str, Any]:
    return {"sent": sent, "acknowledged": report.acknowledged, "undelivered": len(report.failed)}


def _require_delivery(report: "DeliveryReport", sent: int) -> None:
    from ingest.errors import IngestError

    if report.failed:
        first = report.failed[0]
        raise IngestError(
            f"{len(report.failed)} of {sent} events were not acknowledged, first {first.event_id}: "
            f"{first.reason}; send them again, readers count an event once"
        )


def _lines(file: str, mapping: Path | None, settings: "Settings") -> "Iterator[Line]":
    """The lines of FILE as events and refusals."""
    from datetime import UTC, datetime

    from features.errors import BadInput
    from ingest.lines import read_lines
    from ingest.mapping import read_mapping

    names = read_mapping(mapping) if mapping is not None else None
    try:
        with _opened(file) as lines:
            yield from read_lines(lines, settings.features, now=datetime.now(UTC), mapping=names)
    except (OSError, EOFError) as error:
        cause = getattr(error, "strerror", None) or error
        raise BadInput(f"{file} cannot be read: {cause}; name a file of JSON lines, or -") from error


def _opened(file: str) -> "AbstractContextManager[Iterable[bytes]]":
    if file == "-":
        return nullcontext(sys.stdin.buffer)
    return gzip.open(file, "rb") if file.endswith(".gz") else Path(file).open("rb")


@contextmanager
def _progress(words: str, total: int | None, *, quiet: bool) -> "Iterator[Callable[[int], None]]":
    """A progress bar for a person who watches standard error; yields the function that moves it."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(words, total=total)
        yield lambda done: progress.update(task, completed=done)
