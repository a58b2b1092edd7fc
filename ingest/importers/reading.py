"""The importers by name."""

from collections.abc import Callable
from pathlib import Path

from . import amazon, movielens, sequences, yelp
from .dataset import Dataset, DatasetUnreadable

IMPORTERS: dict[str, Callable[[Path], Dataset]] = {
    "movielens": movielens.read,
    "amazon": amazon.read,
    "yelp": yelp.read,
    "sequences": sequences.read,
}
"""Name on the command line -> reader of a file or folder in that published format."""


def read_dataset(name: str, path: Path) -> Dataset:
    """Read ``path`` with the importer ``name``; events in time order.

    Raises DatasetUnreadable for a name nobody knows, and for files that are not in the named format.
    """
    reader = IMPORTERS.get(name)
    if reader is None:
        raise DatasetUnreadable(f"no importer {name}; there are {', '.join(IMPORTERS)}")
    return reader(path)
