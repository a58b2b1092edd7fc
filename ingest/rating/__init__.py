"""Ratings of reviews by what they say: 1 to 5, as the paper's sentiment model gives them.

A review with stars needs none of this: its level follows from its value as it lands. One without says nothing
yet (its level is null), and a worker of its own (``align3gr rate``) reads such reviews from the topic and
publishes a ``rating`` of the same user, item, request and moment. Ingest waits for nobody. Nothing here
imports torch until a model is configured.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lexicon import LexiconRater
    from .rater import Rater, rater_of, rating_of, wants_rating
    from .worker import RatingReport, RatingWorker

_HOMES = {
    "LexiconRater": "lexicon",
    "Rater": "rater",
    "RatingReport": "worker",
    "RatingWorker": "worker",
    "rater_of": "rater",
    "rating_of": "rater",
    "wants_rating": "rater",
}

__all__ = [
    "LexiconRater",
    "Rater",
    "RatingReport",
    "RatingWorker",
    "rater_of",
    "rating_of",
    "wants_rating",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
