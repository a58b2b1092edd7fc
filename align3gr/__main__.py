"""The ``align3gr`` command line: sub-commands that read like the loop.

Command modules import what is heavy inside their functions: ``align3gr --help`` and an ingest worker must
not pay for torch or feast.
"""

import importlib.util
import sys
from pathlib import Path

import typer

from .commands import (
    backbone,
    broker,
    catalogue,
    curriculum,
    demo,
    evaluate,
    events,
    export_preferences,
    features,
    ingest,
    keeping,
    policy,
    quality,
    rate,
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
    rate,
    catalogue,
    features,
    tokenize,
    backbone,
    sft,
    curriculum,
    rounds,
    policy,
    recommend,
    evaluate,
    export_preferences,
    serve,
    status,
    quality,
    keeping,
    demo,
):
    app.add_typer(_module.app)


def main() -> None:
    """Entry point of the ``align3gr`` script."""
    shadowed = _shadowed_package()
    if shadowed:
        sys.stderr.write(f"align3gr: {shadowed}\n")
        sys.exit(1)
    sys.exit(run(app))


def _shadowed_package() -> str | None:
    """Which of our packages another one hides, in words; ``trainer`` is a public package's name too."""
    ours = Path(__file__).resolve().parent.parent
    for name in ("features", "ingest", "policies", "trainer"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != ours / name:
            return (
                f"another package named {name} ({found}) hides the product's own; "
                "install align3gr into a virtual environment of its own"
            )
    return None


if __name__ == "__main__":
    main()
