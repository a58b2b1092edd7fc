"""The rater that needs no model: VADER's lexicon and rules, read sentence by sentence.

VADER (Hutto and Gilbert, 2014) gives a sentence a compound sentiment in -1 .. 1. Over a whole review the
compound runs into its ends, so the mean over the sentences is taken; four bounds cut it into 1 to 5. The
default bounds are the best for amazon reviews of musical instruments, one half of the users (by hash), by the
mean of macro-F1 over five stars and over three levels; ``benchmarks/rater.py`` finds them and reports the
other half. English only: a text without one word of the lexicon says nothing, and is not rated.
"""

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from ingest.errors import RaterUnusable
from ingest.settings import RatingSettings

_SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")


class LexiconRater:
    """Mean compound sentiment of the sentences, cut at ``settings.bounds``."""

    def __init__(self, settings: RatingSettings) -> None:
        """Raises RaterUnusable where vaderSentiment is not installed."""
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ModuleNotFoundError as error:
            raise RaterUnusable(
                "the lexicon rater needs the package vaderSentiment: install align3gr[rate], "
                "or set ingest.rating.rater to classifier or causal"
            ) from error
        self._settings = settings
        self._vader: Any = SentimentIntensityAnalyzer()
        told = repr((sorted(self._vader.lexicon.items()), settings.bounds, settings.max_chars))
        self.version = f"lexicon-{blake2b(told.encode(), digest_size=6).hexdigest()}"

    def rate(self, texts: Sequence[str]) -> list[int | None]:
        """1 to 5 for each text; None where no word of it is in the lexicon."""
        return [
            None if score is None else 1 + int(np.searchsorted(self._settings.bounds, score, side="right"))
            for score in map(self.sentiment, texts)
        ]

    def sentiment(self, text: str) -> float | None:
        """Mean compound of the sentences, -1 .. 1; None where no word of them is in the lexicon."""
        sentences = [part for part in _SENTENCES.split(text[: self._settings.max_chars]) if part.strip()]
        found = [self._vader.polarity_scores(sentence) for sentence in sentences]
        if not any(scores["pos"] or scores["neg"] for scores in found):
            return None
        return float(np.mean([scores["compound"] for scores in found]))
