"""Commands: features (follow, show, export)."""

from typing import TYPE_CHECKING

import typer

from ..console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from features.online.follow import Step

app = typer.Typer()
group = typer.Typer(no_args_is_help=True)
app.add_typer(group, name="features", help="The feature store: keep it fresh, look into it.")


@group.command()
def follow(
    context: typer.Context,
    once: bool = typer.Option(False, "--once", help="Catch up with the log, then end."),
    rebuild: bool = typer.Option(False, "--rebuild", help="Push every user and item again first."),
    as_json: bool = JsonOption,
) -> None:
    """Keep the online store at the newest version of the feedback log."""
    import signal
    import sys
    import threading

    from rich.progress import Progress

    from features.online.follow import follow as run

    settings = settings_of(context)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def stepped(step: "Step") -> None:
        facts = {
            "version": step.version,
            "users": step.users,
            "items": step.items,
            "seconds": round(step.seconds, 3),
        }
        if as_json:
            emit(facts, as_json)
        else:
            say(
                f"version {step.version}: {step.users} users, {step.items} items, "
                f"{step.seconds * 1000:.0f} ms"
            )

    with Progress(transient=True, disable=as_json or not sys.stderr.isatty()) as bar:
        task = bar.add_task("pushing users", visible=False)

        def progress(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of, visible=done < of)

        run(
            settings.home / "log",
            settings.home / "online",
            settings.features,
            once=once,
            rebuild=rebuild,
            stop=stop,
            stepped=stepped,
            progress=progress,
        )


@group.command()
def show(
    context: typer.Context,
    user: str = typer.Argument(help="The user's id."),
    as_json: bool = JsonOption,
) -> None:
    """What the online store knows of one user: the context of that user's next recommendation."""
    from features.errors import BadInput
    from features.online.contexts import OnlineFeatures

    settings = settings_of(context)
    reader = OnlineFeatures.open(settings.home / "online", settings.features.online)
    known = reader.everything(user)
    if known["events"] is None:
        raise BadInput(
            f"nothing is known online of user {user}; check the id, or run align3gr features follow --once"
        )
    emit({"user_id": user, **known}, as_json)


@group.command()
def export(context: typer.Context, as_json: bool = JsonOption) -> None:
    """Write the past of the online features to Parquet, for Feast's historical retrieval."""
    import sys

    from rich.progress import Progress

    from features.online.exports import export as run

    settings = settings_of(context)
    with Progress(transient=True, disable=as_json or not sys.stderr.isatty()) as bar:
        task = bar.add_task("versions of the log")
        written = run(
            settings.home / "log",
            settings.home / "online",
            settings.features,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
        )
    emit({"version": written.version, "states": written.states, "slots": written.slots}, as_json)
