"""The catalogue: what can be recommended, as an append-only Delta table in which the latest revision wins.

A load appends only what changed, under the next revision; delisting appends the item once more, unlisted.
Invariant: an item that is not listed is never recommended. Two loads at once conflict on the revision, which
is a compare-and-set; the second starts again on what the first wrote.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from .delta_files import files_of
from .errors import BadInput, FeaturesError
from .interactions import Id
from .space import require_space

CATALOGUE_SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string()),
        pa.field("title", pa.string()),
        pa.field("text", pa.string()),
        pa.field("categories", pa.list_(pa.string())),
        pa.field("attributes", pa.string()),
        pa.field("listed", pa.bool_()),
        pa.field("revision", pa.int64()),
        pa.field("loaded_at", pa.timestamp("us", "UTC")),
    ]
)
"""Columns of the table and of ``Catalogue.items``. ``attributes``: a JSON object."""

_APP = "catalogue"
_CONTENT = ("title", "text", "categories", "attributes", "listed")
_ATTEMPTS = 5


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One item: what a person reads about it, and whether it may be recommended."""

    item_id: Id
    title: str = ""
    text: str = ""
    categories: tuple[str, ...] = ()
    attributes: dict[str, Any] = {}
    """Anything else worth keeping, as JSON."""
    listed: bool = True

    @property
    def words(self) -> str:
        """Title, categories and text in one string: what text embeddings see."""
        return ". ".join(part for part in (self.title, ", ".join(self.categories), self.text) if part)


class UnknownItem(FeaturesError, BadInput):  # noqa: N818 - reads as what it is
    """An item id that the catalogue does not hold."""


class ItemRefused(FeaturesError, BadInput):  # noqa: N818
    """An item that the catalogue does not take; nothing of its load was written."""


class CatalogueMissing(FeaturesError, BadInput):  # noqa: N818
    """There is no catalogue where one was expected."""


@dataclass(frozen=True)
class LoadReport:
    """What a load or a delisting did to the catalogue."""

    added: int
    changed: int
    unchanged: int
    revision: int
    """Revision of the catalogue afterwards; 0 is the empty one."""
    items: int
    """Items that the catalogue holds, unlisted ones included."""
    listed: int
    """Items that may be recommended."""


class Catalogue:
    """One handle on the catalogue. Not shared between threads."""

    def __init__(self, uri: str, storage_options: dict[str, str] | None = None) -> None:
        self._uri = uri
        self._storage_options = storage_options

    @classmethod
    def open(
        cls, path: str | Path, *, create: bool = True, storage_options: dict[str, str] | None = None
    ) -> "Catalogue":
        """The catalogue at ``path``; made when missing and ``create``.

        Raises CatalogueMissing when it is missing and may not be made, or is another kind of table.
        """
        uri = str(path) if "://" in str(path) else str(Path(path).absolute())
        try:
            _require_columns(uri, DeltaTable(uri, storage_options=storage_options))
        except TableNotFoundError:
            if not create:
                raise CatalogueMissing(
                    f"no catalogue at {uri}; run align3gr catalogue load FILE, or check the setting home"
                ) from None
            if "://" not in uri:
                Path(uri).mkdir(parents=True, exist_ok=True)
            DeltaTable.create(
                uri,
                CATALOGUE_SCHEMA,
                mode="ignore",
                name="catalogue",
                storage_options=storage_options,
                configuration={"delta.appendOnly": "true", "delta.dataSkippingStatsColumns": "revision"},
            )
        return cls(uri, storage_options)

    @property
    def revision(self) -> int:
        """Number of the newest revision; it grows whenever the catalogue changes. 0 is the empty one."""
        return self._table().transaction_version(_APP) or 0

    def load(self, items: Iterable[Item], *, now: datetime, allow_no_text: bool = False) -> LoadReport:
        """Add ``items`` and replace those that differ. An item loaded again is listed as it says.

        Raises ItemRefused, and writes nothing, for an item id given twice, or for an item that has neither
        title nor text (unless ``allow_no_text``).
        """
        wanted: dict[str, Item] = {}
        for item in items:
            if item.item_id in wanted:
                raise ItemRefused(f"item {item.item_id} is given twice; keep one")
            if not allow_no_text and not (item.title.strip() or item.text.strip()):
                raise ItemRefused(
                    f"item {item.item_id} has neither title nor text; add one, or load with --allow-no-text"
                )
            wanted[item.item_id] = item
        return self._write(wanted, now)

    def delist(self, item_ids: Sequence[str], *, now: datetime) -> LoadReport:
        """Never recommend ``item_ids`` again, until they are loaded again.

        Raises UnknownItem, and writes nothing, when one of them is not in the catalogue.
        """
        known = _items_of(_among(_latest(_rows_of(self._table())), item_ids))
        for item_id in item_ids:
            if item_id not in known:
                raise UnknownItem(f"item {item_id} is not in the catalogue; nothing was delisted")
        gone = {item_id: msgspec.structs.replace(known[item_id], listed=False) for item_id in item_ids}
        return self._write(gone, now)

    def show(self, item_id: str) -> Item:
        """The latest revision of one item. Raises UnknownItem."""
        rows = _rows_of(self._table(), pc.field("item_id") == item_id)
        found = list(_items_of(_latest(rows)).values())
        if not found:
            raise UnknownItem(f"item {item_id} is not in the catalogue; see align3gr catalogue load")
        return found[0]

    def items(self, listed_only: bool = True, *, revision: int | None = None) -> pa.Table:
        """The latest revision of every item in CATALOGUE_SCHEMA, sorted by item_id.

        As of ``revision`` of the catalogue, when given.
        """
        then = None if revision is None else pc.field("revision") <= revision
        table = _latest(_rows_of(self._table(), then))
        return table.filter(table["listed"]) if listed_only else table

    def first_loaded(self) -> dict[str, datetime]:
        """When each item first came in, whatever became of it later."""
        rows = _rows_of(self._table()).group_by("item_id").aggregate([("loaded_at", "min")])
        names, times = rows["item_id"].to_pylist(), rows["loaded_at_min"].to_pylist()
        return dict(zip(names, times, strict=True))

    def _write(self, wanted: dict[str, Item], now: datetime) -> LoadReport:
        for _ in range(_ATTEMPTS):
            handle = self._table()
            revision = handle.transaction_version(_APP) or 0
            table = _latest(_rows_of(handle))
            before = _among(table, wanted)
            known = dict(zip(before["item_id"].to_pylist(), _contents(before), strict=True))
            rows = _rows(list(wanted.values()), revision + 1, now)
            differs = [known.get(i) != row for i, row in zip(wanted, _contents(rows), strict=True)]
            changes = sum(differs)
            added = len(wanted) - len(known)
            if changes:
                revision += 1
                changed = rows.filter(pa.array(differs))
                try:
                    require_space(self._uri, changed.nbytes)
                    write_deltalake(
                        handle,
                        changed,
                        mode="append",
                        commit_properties=CommitProperties(app_transactions=[Transaction(_APP, revision)]),
                    )
                except CommitFailedError:
                    continue  # another load was first: start again on what it wrote
                except (DeltaError, OSError) as error:
                    raise FeaturesError(
                        f"the catalogue at {self._uri} cannot be written ({' '.join(str(error).split())}); "
                        "check the disk's space and rights: nothing of this load was written"
                    ) from error
            return LoadReport(
                added=added,
                changed=changes - added,
                unchanged=len(wanted) - changes,
                revision=revision,
                items=table.num_rows + added,
                listed=_listed(table) - _listed(before) + _listed(rows),
            )
        raise FeaturesError("the catalogue is being loaded by others all the time; try again")

    def _table(self) -> DeltaTable:
        return DeltaTable(self._uri, storage_options=self._storage_options)


def _require_columns(uri: str, table: DeltaTable) -> None:
    columns = {field.name for field in table.schema().fields}
    lacking = [name for name in CATALOGUE_SCHEMA.names if name not in columns]
    if lacking:
        raise CatalogueMissing(
            f"the table at {uri} has no column {lacking[0]}: it is not a catalogue of this version; "
            "name another home, or upgrade align3gr"
        )


def _rows_of(table: DeltaTable, only: pc.Expression | None = None) -> pa.Table:
    """Every row (that ``only`` holds for) of the table's version, in CATALOGUE_SCHEMA.

    Arrow reads local files by itself. Given delta-rs's Python file system instead, its threads may ask for
    the interpreter while that ends, and a command that has done its work aborts (delta-rs, issue 2184;
    ``codec decode`` one time in four).
    """
    files = files_of(table)
    if any("://" in file for file in files):
        return table.to_pyarrow_table(columns=CATALOGUE_SCHEMA.names, filters=only)
    return ds.dataset(files, schema=CATALOGUE_SCHEMA).to_table(filter=only)


def _latest(table: pa.Table) -> pa.Table:
    """The newest revision of each item, sorted by item_id."""
    table = table.cast(CATALOGUE_SCHEMA).sort_by([("item_id", "ascending"), ("revision", "ascending")])
    ids = table["item_id"].combine_chunks()
    if len(ids) == 0:
        return table
    last = pc.not_equal(ids.slice(0, len(ids) - 1), ids.slice(1))
    return table.filter(pa.concat_arrays([last, pa.array([True])])).combine_chunks()


def _among(table: pa.Table, item_ids: Iterable[str]) -> pa.Table:
    return table.filter(pc.is_in(table["item_id"], pa.array(list(item_ids), pa.string())))


def _listed(table: pa.Table) -> int:
    return pc.sum(table["listed"]).as_py() or 0


def _contents(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """What makes an item differ from its earlier revision, row by row."""
    return zip(*(table[name].to_pylist() for name in _CONTENT), strict=True)


def _items_of(table: pa.Table) -> dict[str, Item]:
    return {
        row["item_id"]: Item(
            item_id=row["item_id"],
            title=row["title"],
            text=row["text"],
            categories=tuple(row["categories"]),
            attributes=json.loads(row["attributes"]),
            listed=row["listed"],
        )
        for row in table.to_pylist()
    }


def _rows(items: list[Item], revision: int, now: datetime) -> pa.Table:
    n = len(items)
    columns = {
        "item_id": [item.item_id for item in items],
        "title": [item.title for item in items],
        "text": [item.text for item in items],
        "categories": [list(item.categories) for item in items],
        "attributes": [_json_of(item.attributes) for item in items],
        "listed": [item.listed for item in items],
        "revision": [revision] * n,
        "loaded_at": [now] * n,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in CATALOGUE_SCHEMA], schema=CATALOGUE_SCHEMA)


def _json_of(attributes: dict[str, Any]) -> str:
    return json.dumps(attributes, ensure_ascii=False, sort_keys=True) if attributes else "{}"
