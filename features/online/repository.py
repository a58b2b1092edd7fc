"""Opens the Feast repository under ``home/online``: written from the settings, applied once, shared by all.

The follower and any number of servers may open it at the same time; a file lock makes one of them apply it.
Feast's usage statistics are switched off before Feast is imported, and nothing is downloaded.
"""

import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from ..errors import FeaturesError
from ..settings import OnlineSettings
from .definitions import ITEM_VIEWS, USER_VIEWS, definitions

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)

_PROMETHEUS = ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR")

TEMPLATE = Path(__file__).with_name("feature_store.yaml")


class OnlineUnavailable(FeaturesError):  # noqa: N818 - reads as what it is
    """The online store cannot be opened, read or written."""


def open_store(folder: Path, settings: OnlineSettings) -> "FeatureStore":
    """The Feast store of ``folder`` (``home/online``), with its definitions applied.

    Raises OnlineUnavailable when Feast is not installed or the store cannot be reached.
    """
    FeatureStore = _feast()  # noqa: N806 - it is the class
    folder = folder.resolve()
    exports = folder / "exports"
    exports.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / "apply.lock"):
        configuration = _configuration(folder, settings)
        (folder / "feature_store.yaml").write_text(configuration, encoding="utf-8")
        try:
            store = FeatureStore(repo_path=str(folder))
            wanted = _fingerprint(configuration)
            if _applied(folder) != wanted:
                if settings.store == "sqlite":
                    _write_ahead(folder / "online.db")
                store.apply(list(definitions(exports).objects))
                (folder / "applied.json").write_text(json.dumps({"definitions": wanted}), encoding="utf-8")
                log.info("online_repository=applied folder=%s store=%s", folder, settings.store)
        except Exception as error:
            raise OnlineUnavailable(
                f"online store at {folder} cannot be opened: {error}; see features.online in the settings"
            ) from error
    return store


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an advisory lock on ``path``; the kernel releases it when the process dies.

    Raises OnlineUnavailable at once when another process holds it and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise OnlineUnavailable(
                f"another process already follows the log into {path.parent}; stop it or let it work"
            ) from error
        yield


def _feast() -> Any:
    """The class, without what its import does to the process: usage statistics, a Prometheus folder that
    would make this process and its children keep their own metrics in files, and every library's warnings.
    """
    os.environ["FEAST_USAGE"] = "False"
    kept = {name: os.environ.get(name) for name in _PROMETHEUS}
    try:
        with warnings.catch_warnings():
            from feast import FeatureStore
    except ImportError as error:
        raise OnlineUnavailable(
            f"Feast cannot be imported ({error}); install the 'online' extra of align3gr"
        ) from error
    for name, value in kept.items():
        if value is None:
            os.environ.pop(name, None)
    return FeatureStore


def _configuration(folder: Path, settings: OnlineSettings) -> str:
    if settings.store == "sqlite":
        online = {"type": "sqlite", "path": str(folder / "online.db")}
    else:
        online = {"type": "redis", "connection_string": settings.redis}
    lines = "\n".join(f"  {key}: {json.dumps(value)}" for key, value in online.items())
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(registry=json.dumps(str(folder / "registry.db")), online_store=lines)


def _fingerprint(configuration: str) -> str:
    described: dict[str, Any] = {"yaml": configuration, "views": USER_VIEWS, "items": ITEM_VIEWS}
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]


def _applied(folder: Path) -> str | None:
    try:
        marker = json.loads((folder / "applied.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return str(marker["definitions"]) if (folder / "registry.db").exists() else None


def _write_ahead(database: Path) -> None:
    """Readers must not wait for the follower's commits: the write-ahead log is a property of the file."""
    connection = sqlite3.connect(database)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
