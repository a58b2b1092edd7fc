"""Commands: demo."""

import typer

app = typer.Typer()
