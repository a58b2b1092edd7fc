"""Command: export-preferences."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from align3gr.console import JsonOption, emit, settings_of

if TYPE_CHECKING:
    import pyarrow as pa

app = typer.Typer()


@app.command("export-preferences")
def export_preferences(
    context: typer.Context,
    out: Path = typer.Argument(..., help="File to write: .jsonl or .parquet."),
    stage: str = typer.Option("easy", "--stage", help="Which samples of the dataset: easy or hard."),
    dataset: Path | None = typer.Option(
        None, "--dataset", help="Dataset folder, or a Parquet file of samples (default: the newest dataset)."
    ),
    version: str | None = typer.Option(
        None, "--policy", help="Policy whose tokens are written (default: the reference)."
    ),
    rows: Literal["pairs", "lists"] = typer.Option(
        "pairs", "--rows", help="A row a pair, which plain TRL trains on, or a row a sample with a list."
    ),
    role: str = typer.Option("train", "--role", help="train, stop, gate or all users."),
    as_json: bool = JsonOption,
) -> None:
    """Write a stage's preference samples as text in TRL's columns: prompt, chosen, rejected.

    They belong to one policy, whose codec says what an item is called; `align3gr policy export` writes that
    policy as the plain directory that TRL trains.
    """
    from align3gr.progress import Bars
    from policies.errors import BadRequest
    from policies.ledger import PromotionLedger
    from policies.policy import Policy
    from policies.registry import Registry
    from trainer.preference.trl_data import export_preferences as export

    settings = settings_of(context)
    name = version or PromotionLedger(settings.home / "ledger").reference()
    if name is None:
        raise BadRequest("there is no reference policy yet: name one with --policy, or run align3gr sft")
    table = read_samples(settings.home / "datasets", dataset, stage, role)
    policy = Policy.load(Registry(settings.home, settings.policies.registry).path(name))
    with Bars(shown=not as_json) as bars:
        done = export(
            table,
            policy,
            out,
            rows=rows,
            max_rejected=settings.trainer.preference.max_rejected,
            progress=lambda done, total: bars("samples", done, total),
        )
    emit(done.as_dict(), as_json)


def read_samples(datasets: Path, named: Path | None, stage: str, role: str) -> "pa.Table":
    """The samples asked for: of a dataset's stage, or of one Parquet file with the same columns.

    Raises BadRequest for a stage, role or file that cannot be, DatasetMissing where there is none.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from features.datasets import PreferenceDataset
    from features.manifest import MANIFEST, STAGES, DatasetMissing
    from policies.errors import BadRequest

    roles = ("train", "stop", "gate", "all")
    if role not in roles:
        raise BadRequest(f"role {role}: choose one of {', '.join(roles)}")
    if named is not None and named.is_file():
        try:
            table = pq.read_table(named)
        except (OSError, pa.ArrowInvalid) as error:
            cause = " ".join(str(error).split())
            raise BadRequest(f"{named} cannot be read as Parquet: {cause}; name a dataset folder") from error
        missing = {"sample_id", "history", "chosen", "rejected"} - set(table.column_names)
        if missing:
            raise BadRequest(f"{named} has no column {min(missing)}, so it holds no preference samples")
    else:
        if stage not in STAGES:
            raise BadRequest(f"stage {stage}: choose one of {', '.join(STAGES)}, or name a Parquet file")
        found = [named] if named is not None else [path.parent for path in datasets.glob(f"[!.]*/{MANIFEST}")]
        if not found:
            raise DatasetMissing(f"{datasets} holds no finished dataset; build one with align3gr round")
        newest = max(map(PreferenceDataset.open, found), key=lambda one: one.manifest.built_at)
        table = newest.stage(stage)
    if role != "all" and "role" in table.column_names:
        table = table.filter(pc.field("role") == role)
    return table
