"""Commands: serve."""

import typer

app = typer.Typer()
