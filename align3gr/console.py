"""What commands share: the settings they run with, one way to print facts, one way to fail.

Facts go to standard output (a JSON object with ``--json``), progress and errors to standard error.
"""

import errno
import json
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.exceptions import TyperException

if TYPE_CHECKING:
    from .settings import Settings


class Session:
    """One invocation of the command line: its settings file, and whether tracebacks are wanted."""

    def __init__(self, settings_file: Path | None, debug: bool) -> None:
        self.settings_file = settings_file
        self.debug = debug

    @cached_property
    def settings(self) -> "Settings":
        """Loaded at first use, so that ``--help`` never pays for it."""
        from .settings import load_settings

        return load_settings(self.settings_file)


def session_of(context: typer.Context) -> Session:
    """The Session that the top-level callback put on the context."""
    session = context.find_root().obj
    assert isinstance(session, Session)
    return session


def settings_of(context: typer.Context) -> "Settings":
    """The settings in force for this command."""
    return session_of(context).settings


JsonOption = typer.Option(False, "--json", help="Print the same facts as one JSON object, last line.")


def emit(facts: Mapping[str, Any], as_json: bool, text: Callable[[], str] | None = None) -> None:
    """Print ``facts``: one JSON line for machines, or ``text()`` (default: key-value lines) for people."""
    if as_json:
        sys.stdout.write(json.dumps(facts, default=str, ensure_ascii=False) + "\n")
    elif text is not None:
        sys.stdout.write(text().rstrip("\n") + "\n")
    else:
        width = max((len(key) for key in facts), default=0)
        sys.stdout.write("".join(f"{key:<{width}}  {value}\n" for key, value in facts.items()))
    sys.stdout.flush()


def say(line: str) -> None:
    """One line of progress for a person, on standard error."""
    sys.stderr.write(line.rstrip("\n") + "\n")
    sys.stderr.flush()


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run the command line and turn every outcome into an exit code.

    0 success; 1 a failure; 2 bad input; 130 Ctrl-C. An error is one line on standard error; with
    ``--debug`` its traceback follows.
    """
    debug = "--debug" in (arguments if arguments is not None else sys.argv[1:])
    try:
        result = app(args=arguments, standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == 130:
            say("align3gr: stopped")
        return code
    except (typer.Abort, KeyboardInterrupt):
        say("align3gr: stopped")
        return 130
    except TyperException as error:
        cause = " ".join(error.format_message().split()) or "a command is missing"
        say(f"align3gr: {cause}; see align3gr --help")
        return 2
    except BrokenPipeError:
        return 1
    except Exception as error:  # noqa: BLE001 - the edge of the program: every failure becomes one line
        if debug:
            traceback.print_exc()
        exit_code = getattr(error, "exit_code", 1)
        cause = " ".join(str(error).split()) or type(error).__name__
        if not hasattr(error, "exit_code") and _disk_full(error):
            cause = (
                "no space is left on the disk, or a quota or limit on file sizes is reached: "
                "free some, then run the same command again"
            )
        elif not hasattr(error, "exit_code"):
            cause = f"{type(error).__name__}: {cause} (run again with --debug for the traceback)"
        say(f"align3gr: {cause}")
        return int(exit_code)


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, quota or size limit stands anywhere in the chain of causes."""
    while error is not None:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = any(f"(os error {number})" in str(error) for number in full)  # libraries in Rust
        if said or getattr(error, "errno", None) in full:
            return True
        error = error.__cause__ or error.__context__
    return False
