"""Commands: catalogue."""

import typer

app = typer.Typer()
