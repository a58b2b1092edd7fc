"""How well raters of reviews agree with the stars their writers gave.

    python benchmarks/rater.py FOLDER [--json] [--model DIR --rater classifier|causal] [--limit N]

FOLDER holds reviews in Amazon's published format (``Musical_Instruments_5.json.gz``: 10,261 reviews). Half of
the users, by hash, are the *training* part, the others are *held out*, and only those are reported. Rows:

- *majority*: the most frequent rating of the training part, always;
- *lexicon*: the product's default (VADER, sentence by sentence, at the default bounds);
- *lexicon, fitted*: the same with bounds found on the training part, by coordinate ascent on the mean of both
  macro-F1: this is where the default bounds come from;
- *words*: TF-IDF and a logistic regression fitted to the training part's stars: what a rater that has learned
  from stars of this very shop reaches, the mark above a lexicon that has not;
- *model*: with ``--model``, a local Hugging Face directory, as ``align3gr rate`` would use it.

Figures of each row: accuracy and macro-F1 over five stars and over three levels (1 disliked, 2-3 neutral, 4-5
liked), both confusion matrices (rows: what was given, columns: what was rated, last column: not rated), the
share not rated, and of those rated disliked the share that are (the same for liked).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import circumstances
from features.interactions import Kind
from features.levels import PAPER_SCALE
from features.split import bucket_of
from ingest.importers import read_dataset
from ingest.rating import LexiconRater, rater_of
from ingest.settings import RatingSettings

STARS = (1, 2, 3, 4, 5)
LEVELS = (-1, 0, 1)
CANDIDATES = 160
"""Places tried for each bound."""


def main() -> int:
    """Measure, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("folder", type=Path, help="folder or file of reviews")
    options.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options.add_argument("--model", type=Path, help="local directory of a model to rate with")
    options.add_argument("--rater", choices=["classifier", "causal"], default="classifier")
    options.add_argument("--limit", type=int, help="only so many held-out reviews go through the model")
    given = options.parse_args()
    facts = measure(given.folder, given.model, given.rater, given.limit)
    if given.json:
        print(json.dumps(facts))
        return 0
    print(f"{facts['held_out']} held-out reviews of {facts['reviews']}; fitted bounds {facts['bounds']}")
    for name, row in facts["rows"].items():
        print(
            f"{name:<18} stars: accuracy {row['accuracy']:.3f} macro-F1 {row['macro_f1']:.3f}   levels: "
            f"accuracy {row['level_accuracy']:.3f} macro-F1 {row['level_macro_f1']:.3f}   "
            f"not rated {row['not_rated']:.3f}   {row['reviews_per_s'] or '-'}/s"
        )
    return 0


def measure(folder: Path, model: Path | None, kind: str, limit: int | None) -> dict[str, Any]:
    """Every row on the held-out half."""
    events = read_dataset("amazon", folder).events
    worded = [row for row in events.to_pylist() if row["kind"] == Kind.REVIEW]
    texts = [row["text"] for row in worded]
    stars = np.array([int(row["value"]) for row in worded])
    training = np.array([bucket_of(row["user_id"]) < 500 for row in worded])
    held = [text for text, mine in zip(texts, training, strict=True) if not mine]
    given = stars[~training]
    lexicon = LexiconRater(RatingSettings())
    scores = [lexicon.sentiment(text) for text, mine in zip(texts, training, strict=True) if mine]
    bounds = fitted_bounds(scores, stars[training])
    most = int(np.bincount(stars[training]).argmax())
    words = fitted_words([t for t, mine in zip(texts, training, strict=True) if mine], stars[training])
    raters: dict[str, tuple[Callable[[Sequence[str]], list[int | None]], int]] = {
        "majority": (lambda some: [most] * len(some), len(held)),
        "lexicon": (lexicon.rate, len(held)),
        "lexicon, fitted": (LexiconRater(RatingSettings(bounds=bounds)).rate, len(held)),
        "words": (words, len(held)),
    }
    if model is not None:
        chosen = RatingSettings.model_validate({"rater": kind, "directory": model})
        raters["model"] = (rater_of(chosen).rate, min(limit or len(held), len(held)))
    return {
        "reviews": len(texts),
        "training": int(training.sum()),
        "held_out": len(held),
        "bounds": [round(bound, 3) for bound in bounds],
        "default_bounds": list(RatingSettings().bounds),
        "rater": lexicon.version,
        "rows": {name: row(rate, held[:n], given[:n]) for name, (rate, n) in raters.items()},
        **circumstances(),
    }


def row(
    rate: Callable[[Sequence[str]], list[int | None]], texts: list[str], given: NDArray[np.int64]
) -> dict[str, Any]:
    """One rater's figures. What it does not rate agrees with nothing."""
    started = time.perf_counter()
    answers = rate(texts)
    seconds = time.perf_counter() - started
    rated = np.array([0 if answer is None else answer for answer in answers])
    levels = np.array([int(PAPER_SCALE.level_of(star)) for star in given])
    rated_levels = np.array([9 if answer == 0 else int(PAPER_SCALE.level_of(answer)) for answer in rated])
    by_level = confusion(levels, rated_levels, LEVELS)
    return {
        "accuracy": round(float((rated == given).mean()), 4),
        "macro_f1": round(macro_f1(given, rated, STARS), 4),
        "level_accuracy": round(float((rated_levels == levels).mean()), 4),
        "level_macro_f1": round(macro_f1(levels, rated_levels, LEVELS), 4),
        "disliked_precision": round(by_level[0][0] / max(1, sum(line[0] for line in by_level)), 4),
        "liked_precision": round(by_level[2][2] / max(1, sum(line[2] for line in by_level)), 4),
        "not_rated": round(float((rated == 0).mean()), 4),
        "confusion": confusion(given, rated, STARS),
        "level_confusion": by_level,
        "reviews_per_s": round(len(texts) / seconds, 1) if seconds > 0.01 else None,
        "reviews": len(texts),
    }


def macro_f1(given: NDArray[np.int64], rated: NDArray[np.int64], classes: Sequence[int]) -> float:
    """Mean over ``classes`` of ``2 TP / (given + rated)``; 0 for one that is neither given nor rated."""
    scores = []
    for one in classes:
        both = int(((given == one) & (rated == one)).sum())
        scores.append(2 * both / max(1, int((given == one).sum() + (rated == one).sum())))
    return float(np.mean(scores))


def confusion(given: NDArray[np.int64], rated: NDArray[np.int64], classes: Sequence[int]) -> list[list[int]]:
    """Counts [given][rated], and in a last column what was not rated."""
    none = ~np.isin(rated, classes)
    return [
        [
            *(int(((given == one) & (rated == other)).sum()) for other in classes),
            int(((given == one) & none).sum()),
        ]
        for one in classes
    ]


def fitted_bounds(
    scores: Sequence[float | None], stars: NDArray[np.int64]
) -> tuple[float, float, float, float]:
    """The bounds with the best mean of both macro-F1 on these reviews; coordinate ascent from quantiles."""
    known = np.array([score is not None for score in scores])
    found = np.array([score for score in scores if score is not None])
    stars = stars[known]
    levels = np.array([int(PAPER_SCALE.level_of(star)) for star in stars])
    of_star = np.array([int(PAPER_SCALE.level_of(star)) for star in STARS])

    def goodness(bounds: Sequence[float]) -> float:
        rated = 1 + np.searchsorted(bounds, found, side="right")
        return macro_f1(stars, rated, STARS) + macro_f1(levels, of_star[rated - 1], LEVELS)

    shares = np.cumsum(np.bincount(stars, minlength=6)[1:5]) / len(stars)
    bounds = [float(bound) for bound in np.quantile(found, shares)]
    tried = np.unique(np.quantile(found, np.linspace(0.002, 0.6, CANDIDATES)))
    best, before = goodness(bounds), -1.0
    while best > before:
        before = best
        for place in range(4):
            for bound in tried:
                moved = [*bounds[:place], float(bound), *bounds[place + 1 :]]
                if moved == sorted(moved) and (reached := goodness(moved)) > best:
                    best, bounds = reached, moved
    return bounds[0], bounds[1], bounds[2], bounds[3]


def fitted_words(texts: list[str], stars: NDArray[np.int64]) -> Callable[[Sequence[str]], list[int | None]]:
    """A bag of words and pairs of words with a logistic regression, rare ratings weighted up."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
        LogisticRegression(C=3.0, class_weight="balanced", max_iter=300),
    )
    pipeline.fit(texts, stars)
    return lambda some: [int(answer) for answer in pipeline.predict(list(some))]


if __name__ == "__main__":
    sys.exit(main())
