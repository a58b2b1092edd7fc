"""Commands: broker."""

import typer

app = typer.Typer()
