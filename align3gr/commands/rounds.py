"""Commands: rounds."""

import typer

app = typer.Typer()
