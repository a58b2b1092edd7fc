"""Commands: recommend."""

import typer

app = typer.Typer()
