"""Copies of Delta tables at a pinned version, beside running writers.

What a version is made of never changes: its commits, the checkpoints before it and its data files. So a copy
of these is consistent whatever is appended meanwhile; only a vacuum must not run beside it, which the caller
sees to by holding the lock of upkeep.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from deltalake import DeltaTable

from .delta_files import REPLACED, files_of, files_of_versions
from .errors import FeaturesError
from .tombstones import FOLDER

_LOG = "_delta_log"


def copy_table(table: Path, target: Path, *, also: Iterable[int] = ()) -> int:
    """Copy the newest version of the table in ``table``, and the older ones ``also``, to ``target``.

    Copies for people who were forgotten, and the tombstones, come along. Returns the version. Raises
    FeaturesError when a file is not there or cannot be copied.
    """
    pinned = DeltaTable(str(table.absolute()))
    version = pinned.version()
    older = files_of_versions(str(table.absolute()), (one for one in also if one < version))
    try:
        for file in sorted(older.union(map(Path, files_of(pinned)))):
            _copy(file, table.absolute(), target)
        for path in sorted((table / FOLDER).rglob("*")) if (table / FOLDER).is_dir() else ():
            if path.is_file() and path.suffix != ".tmp":
                _copy(path.absolute(), table.absolute(), target)
        for path in sorted((table / _LOG).iterdir()):
            if path.name[:20].isdigit() and int(path.name[:20]) <= version and path.suffix != ".tmp":
                _copy(path.absolute(), table.absolute(), target)
    except OSError as error:
        raise FeaturesError(
            f"{table} cannot be copied: {error.filename}: {error.strerror}; free space, then start again"
        ) from error
    return version


def _copy(file: Path, root: Path, target: Path) -> None:
    place = file.relative_to(root)
    if not file.exists() and (root / REPLACED / place).exists():
        return  # an old file that lacks somebody by now: its replacement is copied with the others
    (target / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target / place)
