"""Commands: sft."""

import typer

app = typer.Typer()
