"""Command: tokenize; the codec commands come along with it."""

import typer

from align3gr.console import JsonOption, emit, say, settings_of

from .codec import codec

app = typer.Typer()
app.add_typer(codec, name="codec")


@app.command()
def tokenize(
    context: typer.Context,
    seed: int = typer.Option(0, min=0, help="Of the quantizer's weights and batches."),
    device: str = typer.Option("cpu", help="Where it trains: cpu, cuda or cuda:N."),
    leave_out: int = typer.Option(0, min=0, help="Last interactions of each user that nothing may look at."),
    as_json: bool = JsonOption,
) -> None:
    """Fit the codec that gives items and users their SCIDs: frozen encoders, U2I alignment, RQ-VAEs.

    Writes home/codec. A run that was stopped goes on where it was. Policies in service keep the codec they
    were trained on.
    """
    from align3gr.progress import Bars
    from trainer.tokenization import fit_codec
    from trainer.training_input import read_training_input

    settings = settings_of(context)
    given = read_training_input(settings.home, settings.features, need_feedback=False)
    if not given.histories:
        say("no feedback yet: SCIDs come from text alone; run tokenize again when there is some")
    with Bars(shown=not as_json) as bars:
        report = fit_codec(
            given.items,
            given.histories,
            settings.trainer.tokenization,
            settings.home / "codec",
            seed=seed,
            device=device,
            leave_out=leave_out,
            checkpoint=settings.home / "tokenize",
            embeddings=settings.home / "embeddings",
            progress=bars,
        )
    least = settings.trainer.tokenization.alignment.min_pairs
    if given.histories and report.pairs < least:
        say(
            f"only {report.pairs} pairs of feedback, fewer than the {least} that aligning users and items "
            "takes: users get no SCIDs; run tokenize again when there are more"
        )
    emit(
        {"codec": str(settings.home / "codec"), "log_version": given.log_version} | report.as_dict(), as_json
    )
