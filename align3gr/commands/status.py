"""``align3gr status``: where the loop stands, from the log to the reference."""

from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from align3gr.settings import Settings

app = typer.Typer()


@app.command()
def status(context: typer.Context, as_json: bool = JsonOption) -> None:
    """Rows and levels in the log, lag behind Kafka, the data's quality, reference, canary, the last round.

    Exits with 1, after saying what it knows, when Kafka cannot be asked: health checks lean on that.
    """
    settings = settings_of(context)
    problems: list[str] = []
    facts = {**_log(settings), **_lag(settings, problems), **_policies(settings)}
    facts["last_round"] = _last_round(settings)
    facts["data"] = _data(settings)
    facts["problems"] = problems
    emit(facts, as_json, lambda: _text(facts))
    if problems:
        say(f"align3gr: {problems[0]}")
        raise typer.Exit(1)


def _log(settings: "Settings") -> dict[str, Any]:
    from features.duck import connect, view_of
    from features.log import FeedbackLog, LogMissing
    from features.queries import query

    empty = {"disliked": 0, "neutral": 0, "liked": 0, "none": 0}
    nothing = {"rows": 0, "levels": empty, "users": 0, "items": 0, "log_version": None, "watermark": None}
    try:
        snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    except LogMissing:
        return nothing
    with connect(settings.features) as con:
        view_of(con, "log", snapshot)
        row = con.execute(query("log_counts")).fetchone()
    assert row is not None
    return {
        "rows": row[0],
        "levels": dict(zip(empty, row[3:], strict=True)),
        "users": row[1],
        "items": row[2],
        "log_version": snapshot.version,
        "watermark": snapshot.watermark.isoformat() if snapshot.watermark else None,
    }


def _lag(settings: "Settings", problems: list[str]) -> dict[str, Any]:
    from ingest.errors import IngestError
    from ingest.lag import lag

    try:
        return {"lag": lag(settings.kafka, settings.home / "log").waiting}
    except IngestError as error:
        problems.append(str(error))
        return {"lag": None}


def _policies(settings: "Settings") -> dict[str, Any]:
    from policies.ledger import PromotionLedger

    ledger = PromotionLedger(settings.home / "ledger")
    canary = ledger.canary()
    return {
        "reference": ledger.reference(),
        "held": ledger.held(),
        "canary": {**canary.as_dict(), "words": canary.words} if canary is not None else None,
    }


def _data(settings: "Settings") -> dict[str, Any] | None:
    """What the last look at the data's quality found; None where nobody has looked."""
    from trainer.data_hold import DataHold
    from trainer.workplace import utc_now

    last = DataHold(settings.home, settings.features, utc_now).last()
    return None if last is None else {name: last[name] for name in ("at", "held", "accepted")}


def _data_in_words(data: dict[str, Any] | None) -> str:
    if data is None:
        return "not looked at yet: align3gr quality show"
    if data["held"]:
        return f"held: {'; '.join(data['held'])} (align3gr quality accept --why ... lets it pass)"
    return "within its bounds" + (f", {len(data['accepted'])} breaches accepted" if data["accepted"] else "")


def _last_round(settings: "Settings") -> dict[str, Any] | None:
    from trainer.round_state import RoundsTable

    last = RoundsTable(settings.home / "rounds").last()
    if last is None:
        return None
    return {
        "round_id": last.round_id,
        "status": last.status,
        "outcome": last.outcome,
        "message": last.message,
        "started_at": last.started_at,
        "ended_at": last.ended_at,
        "steps": list(last.steps),
    }


def _text(facts: dict[str, Any]) -> str:
    levels = facts["levels"]
    rated = sum(levels[name] for name in ("disliked", "neutral", "liked"))
    shares = ", ".join(
        f"{name} {levels[name]} ({levels[name] / rated:.1%})" if rated else f"{name} 0"
        for name in ("liked", "neutral", "disliked")
    )
    last = facts["last_round"]
    lines = [
        f"log        {facts['rows']} rows of {facts['users']} users and {facts['items']} items: {shares}; "
        f"{levels['none']} say nothing by themselves",
        f"watermark  {facts['watermark'] or 'none yet'}",
        f"lag        {'unknown' if facts['lag'] is None else facts['lag']}",
        f"reference  {facts['reference'] or 'none: align3gr tokenize, then align3gr sft'}"
        + (" (automatic promotion is held: align3gr policy resume)" if facts["held"] else ""),
        *([f"canary     {canary['version']}, {canary['words']}"] if (canary := facts["canary"]) else []),
        f"data       {_data_in_words(facts['data'])}",
        f"last round {last['round_id'] + ', ' + (last['outcome'] or last['status']) if last else 'none'}",
    ]
    return "\n".join(lines)
