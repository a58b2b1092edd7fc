"""``align3gr ingest`` and ``align3gr dead-letters``: into the log, and again for what was refused."""

import typer

from align3gr.console import JsonOption, emit, say, settings_of

app = typer.Typer()
dead_letters = typer.Typer(
    no_args_is_help=True, help="What could not be accepted: look at it, send it again."
)
app.add_typer(dead_letters, name="dead-letters")


@app.command()
def ingest(
    context: typer.Context,
    until_caught_up: bool = typer.Option(
        False, help="End when everything that the topic holds now has landed."
    ),
    workers: int = typer.Option(1, min=1, help="Worker processes; more than partitions are of no use."),
    as_json: bool = JsonOption,
) -> None:
    """Land interactions in the feedback log, exactly once, until told to stop (Ctrl-C, SIGTERM)."""
    if workers > 1:
        raise typer.Exit(_run_processes(workers))
    import signal

    from ingest.topics import identify
    from ingest.worker import IngestWorker

    settings = settings_of(context)
    worker = IngestWorker(settings.kafka, settings.ingest, settings.features, settings.home / "log")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    if not until_caught_up:
        identify(settings.kafka)  # a broker or topic that is not there is said alone
        say(
            f"ingest: {settings.kafka.topic} at {settings.kafka.bootstrap_servers} -> {settings.home / 'log'}"
        )
    report = worker.run(until_caught_up=until_caught_up)
    emit(report.facts(), as_json)


def _run_processes(workers: int) -> int:
    """The same command ``workers`` times, one worker each; signals are passed on. The worst exit code."""
    import signal
    import subprocess
    import sys

    arguments, skip = [], False
    for argument in sys.argv[1:]:
        if skip or argument == "--workers":
            skip = not skip
        elif not argument.startswith("--workers="):
            arguments.append(argument)
    processes = [subprocess.Popen([sys.executable, "-m", "align3gr", *arguments]) for _ in range(workers)]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    return max(abs(process.wait()) for process in processes)


@dead_letters.command("list")
def list_letters(
    context: typer.Context,
    reason: str | None = typer.Option(None, help="Only those with this reason code."),
    as_json: bool = JsonOption,
) -> None:
    """What waits: where it came from, why it was refused, how it begins."""
    from collections import Counter

    from ingest.dead_letters import list_dead_letters

    letters = [one for one in list_dead_letters(settings_of(context).kafka) if reason in (None, one.reason)]
    facts = {
        "waiting": len(letters),
        "by_reason": dict(Counter(one.reason for one in letters)),
        "letters": [
            {
                "topic": one.topic,
                "partition": one.partition,
                "offset": one.offset,
                "reason": one.reason,
                "message": one.message,
                "value": one.value.decode(errors="replace"),
            }
            for one in letters
        ],
    }
    lines = [
        f"{one.topic}/{one.partition}@{one.offset}  {one.message}  {one.value[:80].decode(errors='replace')}"
        for one in letters
    ]
    emit(facts, as_json, lambda: "\n".join(lines) or "no dead letters wait")


@dead_letters.command("replay")
def replay_letters(
    context: typer.Context,
    reason: list[str] = typer.Option(
        [], help="Only those with this reason code; may be given several times."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Send again what is acceptable by now (after a new version, a changed setting); the rest stays."""
    from ingest.clock import utc_now
    from ingest.dead_letters import replay_dead_letters

    settings = settings_of(context)
    done = replay_dead_letters(settings.kafka, settings.features, now=utc_now(), reasons=reason)
    facts = {
        "replayed": done.replayed,
        "refused": done.refused,
        "undelivered": [{"event_id": one.event_id, "reason": one.reason} for one in done.undelivered],
    }
    emit(facts, as_json)
    if done.undelivered:
        raise typer.Exit(1)
