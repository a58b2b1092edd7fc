"""What changed in the log between two of its versions, from its own commits.

Compaction rewrites files without changing a row; Delta marks such files, and they are left out here.
"""

import json
from dataclasses import dataclass
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.fs import DeltaStorageHandler
from pyarrow import fs

from ..log import FeedbackLog


@dataclass(frozen=True)
class AddedFiles:
    """Files with new rows, as URIs; ``complete`` is false when a commit or a file is not there any more."""

    files: list[str]
    complete: bool


def added_files(log: FeedbackLog, after: int, upto: int) -> AddedFiles:
    """Files that the commits ``after + 1 .. upto`` added with new rows (not by compaction)."""
    storage = fs.PyFileSystem(DeltaStorageHandler.from_table(log.table._table))
    paths: list[str] = []
    for version in range(after + 1, upto + 1):
        try:
            with storage.open_input_file(f"_delta_log/{version:020d}.json") as commit:
                lines = commit.read().splitlines()
        except OSError:
            return AddedFiles(
                [], complete=False
            )  # cleaned up behind a checkpoint: everything may have changed
        for line in lines:
            if b'"add"' in line:
                add = json.loads(line).get("add")
                if add is not None and add["dataChange"]:
                    paths.append(unquote(add["path"]))
    there = all(found.is_file for found in storage.get_file_info(paths)) if paths else True
    return AddedFiles([_uri(log, path) for path in paths], complete=there)


def log_id(log: FeedbackLog) -> str:
    """Delta's own id of the table."""
    table: DeltaTable = log.table
    return str(table.metadata().id)


def _uri(log: FeedbackLog, path: str) -> str:
    return f"{log.uri.removeprefix('file://').rstrip('/')}/{path}"
