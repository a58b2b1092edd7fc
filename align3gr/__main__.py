"""The ``align3gr`` command line: sub-commands that read like the loop.

Command modules import what is heavy inside their functions: ``align3gr --help`` and an ingest worker must
not pay for torch or feast.
"""

import os
import sys
from pathlib import Path

import typer

from .commands import (
    broker,
    catalogue,
    demo,
    events,
    features,
    ingest,
    policy,
    recommend,
    rounds,
    serve,
    sft,
    status,
    tokenize,
)
from .console import Session, run

app = typer.Typer(
    name="align3gr",
    help="A generative recommender that learns from its users, continuously and safely.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _top(
    context: typer.Context,
    settings: Path | None = typer.Option(
        None, "--settings", envvar="ALIGN3GR_SETTINGS", help="Settings file (default: align3gr.yaml)."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    context.obj = Session(settings, debug)


for _module in (
    broker,
    events,
    ingest,
    catalogue,
    features,
    tokenize,
    sft,
    rounds,
    policy,
    recommend,
    serve,
    status,
    demo,
):
    app.add_typer(_module.app)


def main() -> None:
    """Entry point of the ``align3gr`` script."""
    code = run(app)
    sys.stdout.flush()
    if code == 1:
        # A closed pipe on the other side must not turn into a second error at interpreter exit.
        sys.stderr.flush()
    os._exit(code) if code == 130 else sys.exit(code)


if __name__ == "__main__":
    main()
