"""The files a Delta table's version is made of."""

from urllib.parse import unquote

from deltalake import DeltaTable


def files_of(table: DeltaTable) -> list[str]:
    """Parquet files of the version the handle is at, sorted: paths as they are on the disk, or URIs."""
    # Delta hands out percent-encoded names.
    return sorted(file if "://" in file else unquote(file) for file in table.file_uris())
