"""Commands: quality show, accept, marked."""

from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, settings_of

if TYPE_CHECKING:
    from features.log import LogSnapshot
    from features.quality import QualityReport
    from trainer.data_hold import DataHold, Verdict

app = typer.Typer()
quality = typer.Typer(
    no_args_is_help=True, help="Whether the feedback is fit to learn from, and what is left out."
)
app.add_typer(quality, name="quality")


@quality.command()
def show(context: typer.Context, as_json: bool = JsonOption) -> None:
    """The last period against the trailing ones, and which bounds it left.

    Exits with 1 when a refresh holds because of it.
    """
    hold, snapshot = _rooms(context)
    verdict = hold.look(snapshot)
    emit(_facts(verdict), as_json, lambda: _text(verdict))
    if verdict.held:
        raise typer.Exit(1)


@quality.command()
def accept(
    context: typer.Context,
    why: str = typer.Option(..., "--why", help="Reason, kept beside the acceptance."),
    who: str | None = typer.Option(
        None, "--who", help="Who does this (default: the user of the operating system)."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Let refreshes learn from data that left these bounds, until a period after the data as it is now."""
    import getpass

    hold, snapshot = _rooms(context)
    verdict = hold.accept(snapshot, who=who or getpass.getuser(), why=why)
    emit(_facts(verdict), as_json, lambda: _text(verdict))


@quality.command()
def marked(
    context: typer.Context,
    most: int = typer.Option(20, min=0, help="Rows listed; the counts are of all."),
    as_json: bool = JsonOption,
) -> None:
    """Feedback that is stored and not learned from: unsigned, another's, replayed, impossible, too much."""
    from features.trust import marked_feedback

    settings = settings_of(context)
    _, snapshot = _rooms(context)
    table = marked_feedback(snapshot, settings.features)
    counts = {one["values"]: one["counts"] for one in table.column("mark").value_counts().to_pylist()}
    rows = table.slice(0, most).to_pylist()

    def text() -> str:
        lines = [f"{mark:<12} {count}" for mark, count in sorted(counts.items())] or ["nothing is marked"]
        lines += [
            f"  {row['mark']:<12} {row['user_id']} {row['kind']} {row['item_id']} request {row['request_id']}"
            for row in rows
        ]
        return "\n".join(lines)

    emit({"marks": counts, "rows": rows}, as_json, text)


def _rooms(context: typer.Context) -> "tuple[DataHold, LogSnapshot]":
    from features.log import FeedbackLog
    from trainer.data_hold import DataHold
    from trainer.workplace import utc_now

    settings = settings_of(context)
    snapshot = FeedbackLog.open(settings.home / "log", create=False).snapshot()
    return DataHold(settings.home, settings.features, utc_now), snapshot


def _facts(verdict: "Verdict") -> dict[str, Any]:
    return {
        "held": list(verdict.held),
        "accepted": list(verdict.accepted),
        "report": verdict.report.as_dict(),
    }


def _text(verdict: "Verdict") -> str:
    lines = _periods(verdict.report)
    lines += [f"held: {words}" for words in verdict.held]
    lines += [f"accepted: {words}" for words in verdict.accepted]
    unheld = {one.words for one in verdict.report.breaches} - {*verdict.held, *verdict.accepted}
    lines += [f"out of bounds, not held (features.quality.hold is off): {words}" for words in sorted(unheld)]
    if not verdict.report.breaches:
        lines.append("within its bounds")
    return "\n".join(lines)


def _periods(report: "QualityReport") -> list[str]:
    names = ("period", "events", "users", "items", "liked", "neutral", "disliked", "served", "forged")
    lines = [" ".join(f"{name:>8}" for name in names)]
    lines += [" ".join(f"{one[name] or 0:>8}" for name in names) for one in report.periods]
    if not report.compared:
        lines.append("no earlier period holds enough to compare with")
    return lines
