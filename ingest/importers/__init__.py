"""Published datasets as interactions and catalogue items: MovieLens, Amazon reviews, Yelp, sequence files.

Each importer states its rating -> level mapping through ``source``, which picks the scale in the level rules.
``read_dataset`` is the one way in; what it returns is the same for all of them.
"""

from .dataset import EVENTS_SCHEMA, Dataset, DatasetUnreadable, interactions
from .reading import IMPORTERS, read_dataset

__all__ = ["EVENTS_SCHEMA", "IMPORTERS", "Dataset", "DatasetUnreadable", "interactions", "read_dataset"]
