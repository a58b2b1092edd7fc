"""Commands: catalogue load, delist, show."""

from pathlib import Path

import typer

from align3gr.console import JsonOption, emit, settings_of

app = typer.Typer()
catalogue = typer.Typer(help="What can be recommended.", no_args_is_help=True)
app.add_typer(catalogue, name="catalogue")


@catalogue.command()
def load(
    context: typer.Context,
    file: Path = typer.Argument(help="Items: JSON lines, CSV or Parquet; .gz too."),
    file_format: str | None = typer.Option(None, "--format", help="jsonl, csv or parquet (default: ending)."),
    allow_no_text: bool = typer.Option(False, help="Take items that have neither title nor text."),
    as_json: bool = JsonOption,
) -> None:
    """Add the items of FILE, replacing those that differ. Nothing is written when one cannot be taken."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from features.catalogue import Catalogue
    from features.catalogue_files import read_items

    items = list(read_items(file, file_format))
    report = Catalogue.open(settings_of(context).home / "catalogue").load(
        items, now=datetime.now(UTC), allow_no_text=allow_no_text
    )
    emit(asdict(report), as_json)


@catalogue.command()
def delist(
    context: typer.Context,
    items: list[str] = typer.Argument(help="Item ids."),
    as_json: bool = JsonOption,
) -> None:
    """Never recommend these items again, until loaded again. Nothing is written if one is unknown."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from features.catalogue import Catalogue

    report = Catalogue.open(settings_of(context).home / "catalogue", create=False).delist(
        items, now=datetime.now(UTC)
    )
    emit(asdict(report), as_json)


@catalogue.command()
def show(
    context: typer.Context, item: str = typer.Argument(help="Item id."), as_json: bool = JsonOption
) -> None:
    """What the catalogue holds about one item."""
    import msgspec

    from features.catalogue import Catalogue, Item

    found: Item = Catalogue.open(settings_of(context).home / "catalogue", create=False).show(item)
    emit({name: msgspec.to_builtins(getattr(found, name)) for name in found.__struct_fields__}, as_json)
