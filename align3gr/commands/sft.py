"""Command: sft."""

from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from trainer.sft.training import Step

app = typer.Typer()


@app.command()
def sft(
    context: typer.Context,
    backbone: str | None = typer.Option(
        None, "--backbone", help="demo, tiny, small, or a local model directory (default: from settings)."
    ),
    epochs: int | None = typer.Option(None, "--epochs", min=1, help="Passes over all samples."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Weights, batches, dropped items."),
    leave_out: int = typer.Option(
        0, "--leave-out", min=0, help="Last items of each user it is not trained on (2: paper's protocol)."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    as_json: bool = JsonOption,
) -> None:
    """Train the base policy on next-item prediction, register it, and promote it when it is the first.

    Needs `align3gr tokenize`. Interrupted, the same command goes on from the last checkpoint.
    """
    import getpass

    from align3gr.progress import Bars
    from policies.ledger import PromotionLedger, utc_now
    from policies.registry import Registry
    from trainer.sft.bootstrap import bootstrap
    from trainer.training_input import read_training_input

    settings = settings_of(context)
    chosen = {"backbone": backbone, "epochs": epochs, "seed": seed}
    wanted = settings.trainer.sft.model_copy(
        update={key: value for key, value in chosen.items() if value is not None}
    )
    given = read_training_input(settings.home, settings.features)
    with Bars(shown=not as_json) as bars:

        def progress(step: "Step") -> None:
            note = f"epoch {step.epoch:.1f}  loss {step.loss:.3f}  {step.tokens_per_s:,.0f} tokens/s"
            bars("sft", step.step, step.steps, note)

        done = bootstrap(
            settings.home,
            given,
            wanted,
            Registry(settings.home, settings.policies.registry),
            PromotionLedger(settings.home / "ledger"),
            who=getpass.getuser(),
            clock=utc_now,
            device=device,
            leave_out=leave_out,
            progress=progress,
        )
    facts: dict[str, Any] = {"version": done.version, "promoted": done.promoted} | done.report.as_dict()
    emit(facts, as_json)
    if not done.promoted:
        say(f"{done.version} is registered; to make it the reference: align3gr policy promote {done.version}")
