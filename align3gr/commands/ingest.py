"""Commands: ingest."""

import typer

app = typer.Typer()
