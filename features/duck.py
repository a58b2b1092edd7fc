"""DuckDB over snapshots of the log: one place that opens connections and one that makes views.

Snapshots are read as lists of Parquet files, never by a glob (compacted-away files still lie in the folder)
and without any extension: DuckDB's wheels carry what is needed, nothing is downloaded.
"""

import os
import tempfile
import uuid
from pathlib import Path

import duckdb
import pyarrow as pa

from .log import LogSnapshot
from .settings import FeatureSettings


def connect(settings: FeatureSettings) -> duckdb.DuckDBPyConnection:
    """A fresh in-memory connection with the settings' limits, in UTC, that never installs an extension."""
    duck = settings.duck
    # A folder of its own for each connection: DuckDB's spill files bear the same names in every process.
    parent = duck.temp_directory or Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    spill = parent / f"align3gr-duckdb-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": duck.memory_limit,
        "temp_directory": str(spill),
        "autoinstall_known_extensions": False,
        "preserve_insertion_order": False,
    }
    if duck.threads is not None:
        config["threads"] = duck.threads
    con = duckdb.connect(":memory:", config=config)
    con.execute("set TimeZone = 'UTC'")
    return con


def view_of(con: duckdb.DuckDBPyConnection, name: str, snapshot: LogSnapshot) -> None:
    """Create (or replace) the view ``name`` with exactly the rows of ``snapshot``, in the log's columns.

    The view of a version without files has the same columns and no rows.
    """
    columns = ", ".join(
        f'"{field.name}"::{_sql_type(field.type)} as "{field.name}"' for field in snapshot.schema
    )
    view = f'create or replace temp view "{name}" as select {columns} from '
    if not snapshot.files:
        nothing = ", ".join(f'null as "{field.name}"' for field in snapshot.schema)
        con.execute(f"{view} (select {nothing}) where false")
        return
    files = ", ".join("'" + file.replace("'", "''") + "'" for file in snapshot.files)
    con.execute(f"{view} read_parquet([{files}], hive_partitioning=true, hive_types={{'landed_on': date}})")


_SQL_TYPES = {
    pa.string(): "varchar",
    pa.int8(): "tinyint",
    pa.int32(): "integer",
    pa.int64(): "bigint",
    pa.float64(): "double",
    pa.bool_(): "boolean",
    pa.date32(): "date",
    pa.timestamp("us", "UTC"): "timestamptz",
}


def _sql_type(arrow: pa.DataType) -> str:
    return _SQL_TYPES[arrow]
