"""Commands: status."""

import typer

app = typer.Typer()
