"""The SQL that lies beside this file: one query a file, run by name with named parameters."""

import re
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

_HERE = Path(__file__).parent


@cache
def query(name: str) -> str:
    """Text of ``<name>.sql``."""
    return (_HERE / f"{name}.sql").read_text(encoding="utf-8")


def execute(con: duckdb.DuckDBPyConnection, name: str, values: dict[str, Any]) -> None:
    """Run ``<name>.sql``, a query that makes a table, with those of ``values`` that it names."""
    con.execute(query(name), _named(name, values))


def fetch(con: duckdb.DuckDBPyConnection, name: str, values: dict[str, Any]) -> pa.Table:
    """Run ``<name>.sql``, a query that answers, with those of ``values`` that it names."""
    parameters = _named(name, values)
    answer = con.sql(query(name), params=parameters) if parameters else con.sql(query(name))
    return answer.to_arrow_table()


def text_hash(names: list[str]) -> str:
    """12 hexadecimal digits over the text of these queries: a dataset says by which it was made."""
    text = "".join(f"{name}\n{query(name)}\n" for name in names)
    return blake2b(text.encode(), digest_size=6).hexdigest()


@cache
def _parameters(name: str) -> frozenset[str]:
    code = re.sub(r"--.*", "", query(name))
    return frozenset(re.findall(r"\$([a-z_]+)", code))


def _named(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {parameter: values[parameter] for parameter in _parameters(name)}
