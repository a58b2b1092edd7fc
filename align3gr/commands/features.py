"""Commands: features."""

import typer

app = typer.Typer()
