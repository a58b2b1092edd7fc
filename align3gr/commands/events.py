"""Commands: events."""

import typer

app = typer.Typer()
