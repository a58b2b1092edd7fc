"""All app transactions of a Delta table's version.

The Delta library answers for one app id but does not list them; the transaction log does: the newest
checkpoint at or before the version holds every one, the commits after it hold the changes (Delta protocol,
"Transaction identifiers"). Reads are incremental and go through the table's own storage, local or remote.
"""

import json
import posixpath

import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.fs import DeltaStorageHandler
from pyarrow import fs

from .errors import FeaturesError

_LOG = "_delta_log"


class TransactionReader:
    """Remembers the last state it read, so that following a log costs only its new commits."""

    def __init__(self, table: DeltaTable) -> None:
        self._files = fs.PyFileSystem(DeltaStorageHandler.from_table(table._table))
        self._version = -1
        self._state: dict[str, int] = {}

    def at(self, table: DeltaTable) -> dict[str, int]:
        """App id -> version, as of the version that ``table`` is at."""
        wanted = table.version()
        if self._version > wanted or self._version < 0:
            self._version, self._state = self._start(wanted)
        state = dict(self._state)
        for version in range(self._version + 1, wanted + 1):
            state.update(self._commit(version))
        self._version, self._state = wanted, state
        return dict(state)

    def _start(self, wanted: int) -> tuple[int, dict[str, int]]:
        """The newest whole checkpoint at or before ``wanted``; (-1, {}) when there is none."""
        best = -1
        for info in self._files.get_file_info(fs.FileSelector(_LOG)):
            name = posixpath.basename(info.path)
            if name.endswith(".checkpoint.parquet") and name[:20].isdigit() and len(name) == 39:
                version = int(name[:20])
                if best < version <= wanted:
                    best = version
        if best < 0:
            return -1, {}
        with self._files.open_input_file(f"{_LOG}/{best:020d}.checkpoint.parquet") as file:
            column = pq.read_table(file, columns=["txn"]).column("txn").drop_null()
        return best, {row["appId"]: row["version"] for row in column.to_pylist() if row["appId"] is not None}

    def _commit(self, version: int) -> dict[str, int]:
        path = f"{_LOG}/{version:020d}.json"
        try:
            with self._files.open_input_file(path) as file:
                raw = file.read()
        except (OSError, FileNotFoundError) as error:
            raise FeaturesError(
                f"the log's commit {path} cannot be read ({' '.join(str(error).split())}); restore it"
            ) from error
        found: dict[str, int] = {}
        for line in raw.splitlines():
            if b'"txn"' in line:
                transaction = json.loads(line).get("txn")
                if transaction is not None:
                    found[transaction["appId"]] = transaction["version"]
        return found
