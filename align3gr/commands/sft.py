"""Command: sft."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from align3gr.console import JsonOption, emit, say, settings_of

if TYPE_CHECKING:
    from trainer.settings import SftSettings
    from trainer.sft.tasks.preview import TaskPreview
    from trainer.sft.training import Step
    from trainer.training_input import TrainingInput

app = typer.Typer()


@app.command()
def sft(
    context: typer.Context,
    backbone: str | None = typer.Option(
        None,
        "--backbone",
        help="demo, mini, tiny, small, or a local model directory (default: settings).",
    ),
    epochs: int | None = typer.Option(None, "--epochs", min=1, help="Passes over all samples."),
    seed: int | None = typer.Option(None, "--seed", min=0, help="Weights, batches, dropped items."),
    leave_out: int = typer.Option(
        0, "--leave-out", min=0, help="Last items of each user it is not trained on (2: paper's protocol)."
    ),
    device: str = typer.Option("auto", "--device", help="auto, cpu, cuda or cuda:N."),
    preview: int | None = typer.Option(
        None, "--preview", min=1, help="Print so many examples of each task with a weight; train nothing."
    ),
    all_tasks: bool = typer.Option(False, "--all-tasks", help="With --preview: tasks of weight 0 too."),
    as_json: bool = JsonOption,
) -> None:
    """Train the base policy on next-item prediction and the tasks that settings weigh; register it.

    The very first is promoted. Needs `align3gr tokenize`. Interrupted, the same command goes on from the last
    checkpoint. With GPUs it runs under accelerate launch, one process each; on several hosts start it there
    yourself.
    """
    import getpass

    if all_tasks and preview is None:
        raise typer.BadParameter("--all-tasks goes with --preview; weights are in trainer.sft.tasks")

    from align3gr.progress import Bars
    from policies.ledger import PromotionLedger, utc_now
    from policies.registry import Registry
    from trainer.ranks import join_ranks, launch_command, launched
    from trainer.sft.bootstrap import bootstrap
    from trainer.training_input import read_training_input

    settings = settings_of(context)
    chosen = {"backbone": backbone, "epochs": epochs, "seed": seed}
    wanted = settings.trainer.sft.model_copy(
        update={key: value for key, value in chosen.items() if value is not None}
    )
    given = read_training_input(settings.home, settings.features)
    if preview is not None:
        show_examples(settings.home, given, wanted, preview, all_tasks=all_tasks, as_json=as_json)
        return
    if not launched() and (command := launch_command(device)):
        import os
        import sys

        os.execv(command[0], [*command, "-m", "align3gr", *sys.argv[1:]])
    ranks = join_ranks(device)
    with Bars(shown=not as_json and ranks.leads) as bars:

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
            ranks=ranks,
            progress=progress,
            preparing=bars,
        )
    if done is None:
        return
    facts: dict[str, Any] = {"version": done.version, "promoted": done.promoted} | done.report.as_dict()
    emit(facts, as_json)
    if not done.promoted:
        say(f"{done.version} is registered; to make it the reference: align3gr policy promote {done.version}")


def show_examples(
    home: Path,
    given: "TrainingInput",
    wanted: "SftSettings",
    examples: int,
    *,
    all_tasks: bool,
    as_json: bool,
) -> None:
    """Print what a training would learn from."""
    from dataclasses import asdict

    from trainer.sft.bootstrap import codec_of
    from trainer.sft.tasks import CatalogueText
    from trainer.sft.tasks.preview import preview_tasks
    from trainer.tokenization.text import item_texts

    found = preview_tasks(
        codec_of(home),
        given.histories,
        wanted,
        examples=examples,
        all_tasks=all_tasks,
        texts=item_texts(given.items),
        catalogue=CatalogueText.of(given.items),
    )
    emit({"tasks": [asdict(one) for one in found]}, as_json, lambda: "\n".join(map(as_text, found)))


def as_text(preview: "TaskPreview") -> str:
    """One task for a person: prompts as they are read, and behind ``>>>`` the part that is trained."""
    lines = [
        f"{preview.task}: {preview.does}",
        f"  weight {preview.weight:g}, {preview.samples:,} samples, {preview.skipped:,} skipped: no text",
    ]
    if preview.missing is not None:
        lines.append(f"  {preview.missing}")
    for one in preview.examples:
        lines += [f"  {one.prompt}", f"    >>> {one.target}"]
    return "\n".join([*lines, ""])
