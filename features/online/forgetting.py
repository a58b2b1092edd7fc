"""Forgetting online: a user's values leave the online store, and their past the exports.

A follower that is at work may still push what it read before the log forgot; so either none runs (its lock is
held meanwhile), or it is waited for until it has passed the log's version from which the user is gone.
"""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from ..forgetting import holding, without_user
from ..settings import FeatureSettings
from .definitions import USER_EXPORT
from .follow import POSITION
from .position import read_position
from .repository import OnlineUnavailable, exclusive, open_store

_WAIT_S = 30.0
_CHECKPOINTS = 100


def known_online(folder: Path, settings: FeatureSettings, user_id: str) -> bool:
    """Whether the online store or its exports hold anything of ``user_id``."""
    if holding(settings, _exports(folder), user_id):
        return True
    if not (folder / "registry.db").exists():
        return False
    from .contexts import OnlineFeatures

    return OnlineFeatures.open(folder, settings.online).everything(user_id)["events"] is not None


def forget_online(
    folder: Path, settings: FeatureSettings, user_id: str, *, version: int, items: Sequence[str] = ()
) -> None:
    """Remove ``user_id``, and the counts of ``items``, which nobody else ever met, from ``folder``.

    ``version``: of the log, from which on it does not hold the user. Raises OnlineUnavailable when the store
    cannot be reached, or a follower at work does not come to that version.
    """
    remove_online(folder, settings, [user_id], version=version, items=items)
    with exclusive(folder / "exports" / "export.lock"):
        for left in (folder / "exports").rglob(".*.parquet.*.tmp"):
            left.unlink(missing_ok=True)  # of a run that was killed
        for file in holding(settings, _exports(folder), user_id):
            without_user(file, user_id)


def remove_online(
    folder: Path,
    settings: FeatureSettings,
    user_ids: Sequence[str],
    *,
    version: int,
    items: Sequence[str] = (),
) -> None:
    """Remove the values of ``user_ids`` and ``items`` from the online store, all at once; as above."""
    if (folder / "registry.db").exists():
        with _no_older_push(folder, version):
            store = open_store(folder, settings.online)  # imports Feast, and keeps its noise away
            keys = [_key("user_id", user_id) for user_id in user_ids]
            keys += [_key("item_id", item) for item in items]
            if settings.online.store == "sqlite":
                _from_sqlite(folder / "online.db", keys)
            else:
                _from_redis(store, keys)


def _exports(folder: Path) -> list[Path]:
    return sorted((folder / "exports" / USER_EXPORT).glob("*.parquet"))


@contextmanager
def _no_older_push(folder: Path, version: int) -> Iterator[None]:
    until = time.monotonic() + _WAIT_S
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(exclusive(folder / "follow.lock", wait=False))
                break
            except OnlineUnavailable:
                if read_position(folder / POSITION).version >= version:
                    break
            if time.monotonic() > until:
                raise OnlineUnavailable(
                    f"the follower at work in {folder} has not come to version {version} of the log; let it "
                    "catch up or stop it, then run the same command again"
                )
            time.sleep(0.1)
        yield


def _key(name: str, value: str) -> Any:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    return EntityKey(join_keys=[name], entity_values=[Value(string_val=value)])


def _from_sqlite(database: Path, keys: Sequence[Any]) -> None:
    """Delete, write the database anew (a deleted row's bytes stay in the file), empty its log."""
    from feast.infra.key_encoding_utils import serialize_entity_key

    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as con:
            for table in _feature_tables(con):
                for key in keys:
                    con.execute(f'delete from "{table}" where entity_key = ?', [serialize_entity_key(key)])
            con.execute("vacuum")
            for _ in range(_CHECKPOINTS):
                if con.execute("pragma wal_checkpoint(truncate)").fetchone()[0] == 0:
                    return
                time.sleep(0.1)
    except sqlite3.Error as error:
        raise OnlineUnavailable(
            f"{database} cannot be written: {error}; run the same command again"
        ) from error
    raise OnlineUnavailable(
        f"{database} is being read all the time: its log cannot be emptied; run the same command again"
    )


def _feature_tables(con: sqlite3.Connection) -> list[str]:
    names = con.execute("select name from sqlite_master where type = 'table'").fetchall()
    return [
        name
        for (name,) in names
        if any(column[1] == "entity_key" for column in con.execute(f'pragma table_info("{name}")'))
    ]


def _from_redis(store: Any, keys: Sequence[Any]) -> None:
    """Feast keeps one hash a project and entity; deleting it deletes every view's values."""
    from feast.infra.online_stores.helpers import _redis_key

    try:
        client = store._get_provider().online_store._get_client(store.config.online_store)
        client.delete(*(_redis_key(store.config.project, key) for key in keys))
    except Exception as error:
        raise OnlineUnavailable(
            f"the online store cannot be written: {' '.join(str(error).split())}; is it reachable?"
        ) from error
