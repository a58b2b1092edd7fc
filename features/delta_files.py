"""The files a Delta table's version is made of."""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

REPLACED = Path("_forgotten/files")
"""Where copies of the log's old files lie that lack the rows of who was forgotten, each under the path that
the file itself had: that is gone (features.forgetting)."""


def files_of(table: DeltaTable) -> list[str]:
    """Parquet files of the version the handle is at, sorted: paths as they are on the disk, or URIs."""
    # Delta hands out percent-encoded names.
    return sorted(file if "://" in file else unquote(file) for file in table.file_uris())


def files_of_versions(
    uri: str, versions: Iterable[int], storage_options: dict[str, str] | None = None
) -> set[Path]:
    """Files of the table at ``uri`` at those of ``versions`` that it can still be opened at."""
    files: set[Path] = set()
    for version in sorted(versions):
        table = DeltaTable(uri, storage_options=storage_options)
        if version > table.version():
            continue
        try:
            table.load_as_version(version)
        except DeltaError:
            continue  # its commits are gone: nobody can open it
        files.update(Path(file) for file in files_of(table))
    return files


def replaced(root: str, files: list[str]) -> list[str]:
    """``files`` of a version of the table at ``root``, the replaced ones by what replaced them."""
    folder = Path(root) / REPLACED
    if "://" in root or not folder.is_dir():
        return files
    return [_standing_in(file, Path(root), folder) for file in files]


def _standing_in(file: str, root: Path, folder: Path) -> str:
    other = folder / Path(file).relative_to(root)
    return str(other) if not Path(file).exists() and other.exists() else file
