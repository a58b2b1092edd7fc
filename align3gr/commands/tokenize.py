"""Commands: tokenize."""

import typer

app = typer.Typer()
