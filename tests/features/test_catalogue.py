"""The catalogue: the latest revision wins, a delisted item is not offered, refusals write nothing."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st

from features.catalogue import CATALOGUE_SCHEMA, Catalogue, CatalogueMissing, Item, ItemRefused, UnknownItem
from features.errors import BadInput

NOW = datetime(2026, 5, 1, tzinfo=UTC)
TEA = Item(item_id="tea", title="Tea", text="green", categories=("drinks", "hot"), attributes={"g": 100})
PEN = Item(item_id="pen", title="Pen")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue.open(tmp_path / "catalogue")


def test_a_loaded_item_is_shown_as_it_was_given(catalogue: Catalogue) -> None:
    report = catalogue.load([TEA, PEN], now=NOW)
    assert (report.added, report.changed, report.unchanged, report.revision) == (2, 0, 0, 1)
    assert catalogue.show("tea") == TEA
    assert TEA.words == "Tea. drinks, hot. green"
    table = catalogue.items()
    assert table.schema == CATALOGUE_SCHEMA
    assert table["item_id"].to_pylist() == ["pen", "tea"]


def test_only_what_changed_is_written(catalogue: Catalogue) -> None:
    catalogue.load([TEA, PEN], now=NOW)
    same = catalogue.load([TEA, PEN], now=NOW)
    assert (same.unchanged, same.revision) == (2, 1)
    newer = Item(item_id="pen", title="Blue pen")
    report = catalogue.load([newer, Item(item_id="cup", title="Cup")], now=NOW)
    assert (report.added, report.changed, report.unchanged, report.revision) == (1, 1, 0, 2)
    assert catalogue.show("pen") == newer
    assert catalogue.items()["revision"].to_pylist() == [2, 2, 1]


def test_a_delisted_item_is_known_but_not_listed_until_loaded_again(catalogue: Catalogue) -> None:
    catalogue.load([TEA, PEN], now=NOW)
    report = catalogue.delist(["tea"], now=NOW)
    assert (report.changed, report.items, report.listed) == (1, 2, 1)
    assert catalogue.items()["item_id"].to_pylist() == ["pen"]
    assert catalogue.items(listed_only=False)["item_id"].to_pylist() == ["pen", "tea"]
    assert not catalogue.show("tea").listed
    catalogue.load([TEA], now=NOW)
    assert catalogue.items().num_rows == 2


def test_refusals_write_nothing(catalogue: Catalogue) -> None:
    catalogue.load([TEA], now=NOW)
    with pytest.raises(ItemRefused, match="neither title nor text"):
        catalogue.load([PEN, Item(item_id="blank", title=" ")], now=NOW)
    with pytest.raises(ItemRefused, match="twice"):
        catalogue.load([PEN, PEN], now=NOW)
    with pytest.raises(UnknownItem, match="pen"):
        catalogue.delist(["tea", "pen"], now=NOW)
    with pytest.raises(UnknownItem):
        catalogue.show("pen")
    assert catalogue.revision == 1
    assert catalogue.items()["item_id"].to_pylist() == ["tea"]


def test_items_without_text_are_taken_when_asked_to(catalogue: Catalogue) -> None:
    assert catalogue.load([Item(item_id="blank")], now=NOW, allow_no_text=True).added == 1


def test_two_loads_from_the_same_revision_both_arrive(tmp_path: Path) -> None:
    first, second = Catalogue.open(tmp_path / "c"), Catalogue.open(tmp_path / "c")
    stale = first._table()
    second.load([PEN], now=NOW)
    first._table = lambda handles=iter([stale, first._table()]): next(handles)  # type: ignore[method-assign, misc]
    report = first.load([TEA, PEN], now=NOW)
    assert (report.added, report.unchanged, report.revision) == (1, 1, 2)
    assert second.items()["revision"].to_pylist() == [1, 2]


def test_a_folder_with_a_space_and_an_accent(tmp_path: Path) -> None:
    catalogue = Catalogue.open(tmp_path / "la cave à thé")
    catalogue.load([TEA], now=NOW)
    assert catalogue.show("tea") == TEA
    assert catalogue.items()["item_id"].to_pylist() == ["tea"]


def test_an_empty_catalogue_and_a_missing_one(catalogue: Catalogue, tmp_path: Path) -> None:
    assert (catalogue.revision, catalogue.items().num_rows, catalogue.items(listed_only=False).num_rows) == (
        0,
        0,
        0,
    )
    with pytest.raises(CatalogueMissing) as missing:
        Catalogue.open(tmp_path / "none", create=False)
    assert isinstance(missing.value, BadInput)
    DeltaTable.create(tmp_path / "other", pa.schema([("x", pa.int32())]))
    with pytest.raises(CatalogueMissing, match="no column item_id"):
        Catalogue.open(tmp_path / "other")


words = st.text(st.characters(codec="utf-8"), max_size=10)
items = st.builds(
    Item,
    item_id=st.sampled_from("abc"),
    title=words,
    text=words,
    categories=st.lists(words, max_size=2).map(tuple),
    attributes=st.dictionaries(words, st.none() | st.integers(-5, 5) | words, max_size=2),
    listed=st.booleans(),
)


@settings(max_examples=25, deadline=None)  # each step is a commit of a few milliseconds
@given(loads=st.lists(st.lists(items, max_size=3, unique_by=lambda item: item.item_id), max_size=4))
def test_any_sequence_of_loads_ends_in_the_latest_of_each(
    tmp_path_factory: pytest.TempPathFactory, loads: list[list[Item]]
) -> None:
    catalogue = Catalogue.open(tmp_path_factory.mktemp("c"))
    expected: dict[str, Item] = {}
    for load in loads:
        catalogue.load(load, now=NOW, allow_no_text=True)
        expected |= {item.item_id: item for item in load}
    assert {item_id: catalogue.show(item_id) for item_id in expected} == expected
    listed = sorted(item.item_id for item in expected.values() if item.listed)
    assert catalogue.items()["item_id"].to_pylist() == listed
