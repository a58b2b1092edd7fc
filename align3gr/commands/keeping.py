"""Commands: forget, backup, restore."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from align3gr.forgetting import Forgotten

app = typer.Typer()


@app.command()
def forget(
    context: typer.Context,
    user: str = typer.Argument(help="The user's id."),
    broker: bool = typer.Option(
        True, help="Also mark the user's dead letters as gone; --no-broker leaves them for another run."
    ),
    as_json: bool = JsonOption,
) -> None:
    """Remove USER from log, online store, datasets, rounds and dead letters, and keep them out.

    Ends with the policies that learned from them. Killed, it is run again. Exits with 1 when something that
    names them is left: the broker does not answer, or a file that no step knows.
    """
    from align3gr.forgetting import forget as run
    from trainer.workplace import utc_now

    done = run(settings_of(context), user, clock=utc_now, broker=broker)
    emit({"user_id": user, **done.as_dict()}, as_json, lambda: _text(user, done))
    if done.problem is not None:
        say(
            f"align3gr: the dead letters were not looked through ({done.problem}); run the same command "
            "again when the broker is there"
        )
    elif done.left:
        say(f"align3gr: {done.left[0]} still names {user}; delete it, then run the same command again")
    if done.problem is not None or done.left:
        raise typer.Exit(1)


@app.command()
def backup(
    context: typer.Context,
    target: Path = typer.Argument(help="The folder to make, outside of home.", metavar="DEST"),
    as_json: bool = JsonOption,
) -> None:
    """Copy log, catalogue, datasets, rounds, ledger and policies to DEST, while ingest goes on."""
    from align3gr.backup import back_up
    from trainer.workplace import utc_now

    made = back_up(settings_of(context), target, clock=utc_now)
    emit(made.as_dict(), as_json)


@app.command()
def restore(
    context: typer.Context,
    source: Path = typer.Argument(help="The folder that align3gr backup made.", metavar="SRC"),
    tombstones: Path | None = typer.Option(
        None,
        help="The lost store's log/_forgotten/tombstones.json, when the backup is older: who was forgotten "
        "since is forgotten again.",
        metavar="FILE",
    ),
    as_json: bool = JsonOption,
) -> None:
    """Put a backup into an empty home directory. Every file is compared with its hash first."""
    from align3gr.backup import restore as run
    from trainer.workplace import utc_now

    made, again = run(settings_of(context), source, tombstones=tombstones, clock=utc_now)
    emit({**made.as_dict(), "forgotten_again": len(again)}, as_json)
    say("next: align3gr features follow --rebuild --once, then align3gr policy mirror")


def _text(user: str, done: "Forgotten") -> str:
    lines = [f"{user}: {done.rows} rows of the log, {done.files} files written anew or deleted"]
    for one in done.datasets:
        became = f"is now {one.now}" if one.now else "had nobody else and is gone"
        lines.append(f"dataset {one.was} {became} ({one.samples} samples less)")
    lines += [f"round {name}: their entry left the gate's input" for name in done.rounds]
    lines += [f"table {name}: their rows left it" for name in done.tables]
    if done.letters:
        lines.append(f"{done.letters} dead letters are marked as gone")
    if not done.learned:
        lines.append("no policy learned from them")
    for policy in done.learned:
        why = {
            "dataset": f"its dataset was {policy.through}",
            "base": f"trained {policy.through[:10]}, after their first event",
            "parent": f"continues {policy.through}",
        }[policy.how]
        lines.append(f"policy {policy.version} learned from them: {why}")
    return "\n".join(lines)
