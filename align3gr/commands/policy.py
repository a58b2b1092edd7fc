"""Commands: policy."""

import typer

app = typer.Typer()
