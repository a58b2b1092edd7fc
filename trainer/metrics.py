"""Figures of ranking: Recall and NDCG from places, intervals over users and seeds, the shape of lists.

One relevant item a case. ``better`` items stand before it and ``tied`` have its very score, itself counted;
what breaks ties in a served list is arbitrary, so the figures are the mean over all orders of the tied,
exactly (McSherry & Najork, ECIR 2008). With ``C(r) = sum_{i<=r} 1/log2(1+i)``, ``b`` better and ``t`` tied,

    Recall@k = clip((k - b) / t, 0, 1)        NDCG@k = (C(min(k, b + t)) - C(min(k, b))) / t

which with t = 1 is [r <= k] and [r <= k] / log2(1 + r) at the place r = b + 1. Nothing here knows of policies
or torch: policies (trainer.evaluation), baselines and benchmarks all come through these functions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

CUTOFFS = (1, 5, 10, 20, 50, 100)
"""The k of Recall@k and NDCG@k, unless told otherwise."""

COLUMNS = ("unseen", "all_items")
"""Seen items left out, and all items: two columns that are never mixed."""

COLUMN_WORDS = {"unseen": "seen left out", "all_items": "all items"}

POPULAR_SHARE = 0.01
"""The most popular items whose share of the recommendations is the concentration."""

RESAMPLES = 1000
"""Bootstrap resamples: the ends of a 95% interval are then good to about a tenth of its width."""

CASES_AT_ONCE = 512
"""Cases scored at once by ``rank_scores``; bounds memory, changes no result."""


class RankingModel(Protocol):
    """Anything that scores the whole catalogue after a history."""

    def scores(self, histories: Sequence[IntArray]) -> FloatArray:
        """float32 [n, n_items], higher is better; ``histories``: item rows, oldest first."""
        ...


@dataclass(frozen=True)
class Places:
    """Where each case's target stands."""

    better: Floats
    """[cases] items before it; infinite where it is in no list."""
    tied: IntArray
    """[cases] items with its score, itself counted: 1 in a list."""

    @classmethod
    def of_ranks(cls, ranks: Floats) -> "Places":
        """From places in lists, 1 = first, infinite = not listed."""
        return cls(ranks - 1.0, np.ones(len(ranks), dtype=np.int64))


def per_case(places: Places, cutoffs: Sequence[int]) -> dict[str, Floats]:
    """Metric ("recall@10", "ndcg@10", ...) -> float64 [cases]."""
    most = max(cutoffs)
    gains = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(1.0 + np.arange(1, most + 1)))])
    found: dict[str, Floats] = {}
    for k in cutoffs:
        before = np.minimum(places.better, k)
        until = np.minimum(places.better + places.tied, k)
        found[f"recall@{k}"] = (until - before) / places.tied
        found[f"ndcg@{k}"] = (gains[until.astype(np.int64)] - gains[before.astype(np.int64)]) / places.tied
    return found


@dataclass(frozen=True)
class ListShape:
    """What lists look like, whatever they hit."""

    depth: int
    """Places of each list that were looked at."""
    coverage: float
    """Share of the catalogue that appears in some list, 0..1."""
    concentration: float
    """Share of all places that go to the most popular 1% of items, 0..1."""
    popularity: float
    """Mean percentile of popularity over all places: 1 the most popular item, .5 an ordinary one. The average
    recommendation popularity of Yin et al. 2012 and Abdollahpouri et al. 2019, in percentiles instead of
    counts, so that datasets compare."""

    @classmethod
    def of(
        cls,
        lists: npt.NDArray[np.integer],
        order: IntArray,
        *,
        depth: int,
        popular: IntArray | None = None,
    ) -> "ListShape":
        """``lists``: item rows [n, >= depth], -1 fills. ``order``: the rows of the catalogue, most popular
        first. ``popular``: the rows that concentration counts; none: the first 1% of ``order``."""
        shown = lists[:, :depth]
        shown = shown[shown >= 0]
        if not len(shown):
            return cls(depth, 0.0, 0.0, 0.0)
        if popular is None:
            popular = order[: max(1, round(POPULAR_SHARE * len(order)))]
        place = np.full(int(max(shown.max(), order.max())) + 1, len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return cls(
            depth=depth,
            coverage=len(np.unique(shown)) / len(order),
            concentration=float(np.isin(shown, popular).mean()),
            popularity=float(np.clip(1.0 - place[shown] / max(len(order) - 1, 1), 0.0, 1.0).mean()),
        )


@dataclass(frozen=True)
class Ranked:
    """One column of one ranking model."""

    per_user: Mapping[str, Floats]
    """Metric -> float64 [users]."""
    shape: ListShape

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over users."""
        return {name: float(values.mean()) for name, values in self.per_user.items()}


def rank_scores(
    model: RankingModel,
    histories: Sequence[IntArray],
    targets: IntArray,
    order: IntArray,
    *,
    cutoffs: Sequence[int] = CUTOFFS,
    depth: int = 10,
) -> dict[str, Ranked]:
    """Both columns of a ranking model, a case a user: the target in the catalogue ranked after each history.

    ``order``: every item row, most popular first; ``depth``: places the shape of the lists is taken over.
    A target that the user has met stays in the catalogue. NaN scores are refused (ValueError).
    """
    found: dict[str, list[tuple[Floats, IntArray, IntArray]]] = {column: [] for column in COLUMNS}
    for start in range(0, len(histories), CASES_AT_ONCE):
        part = histories[start : start + CASES_AT_ONCE]
        wanted = targets[start : start + CASES_AT_ONCE]
        scores = np.array(model.scores(part), dtype=np.float32)
        if np.isnan(scores).any():
            raise ValueError("a ranking model gave NaN scores")
        rows = np.arange(len(part))
        mine = scores[rows, wanted].copy()
        for column in reversed(COLUMNS):
            if column == "unseen":
                owner = np.repeat(rows, [len(history) for history in part])
                scores[owner, np.concatenate(part)] = -np.inf
                scores[rows, wanted] = mine
            better = (scores > mine[:, None]).sum(axis=1).astype(np.float64)
            tied = np.maximum((scores == mine[:, None]).sum(axis=1), 1).astype(np.int64)
            found[column].append((better, tied, best(scores, depth)))
    ranked = {}
    for column, parts in found.items():
        better, tied, lists = (np.concatenate(values) for values in zip(*parts, strict=True))
        shape = ListShape.of(lists, order, depth=depth)
        ranked[column] = Ranked(per_case(Places(better, tied), cutoffs), shape)
    return ranked


def best(scores: FloatArray, k: int) -> IntArray:
    """Columns of the k best of each row, best first, ties by column; int64 [n, min(k, n_items)], -1: -inf."""
    k = min(k, scores.shape[1])
    # The k-th best score may be shared: what is above it is in, of the shared the first.
    least = np.partition(scores, -k, axis=1)[:, -k]
    found = np.empty((len(scores), k), dtype=np.int64)
    for row, (values, bound) in enumerate(zip(scores, least, strict=True)):
        above = np.flatnonzero(values > bound)
        chosen = np.concatenate([above, np.flatnonzero(values == bound)[: k - len(above)]])
        chosen = chosen[np.lexsort((chosen, -values[chosen]))]
        found[row] = np.where(values[chosen] == -np.inf, -1, chosen)
    return found


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds 95% of its bootstrap resamples (percentile method)."""

    mean: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[low, high] for JSON."""
        return [self.low, self.high]


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of ``users`` users, drawn with replacement; the same for everything that is compared.

    Efron & Tibshirani 1993, ch. 13. A function of (users, seed, resamples) alone, so that differences of two
    models on the same users are paired. With several seeds a resample draws seeds too (crossed with the
    users): with three seeds that says little of the seeds' spread, and is the most they can say.
    """

    users: int
    seed: int = 0
    resamples: int = RESAMPLES
    confidence: float = 0.95

    def interval(self, values: Floats) -> Interval:
        """Of the mean of ``values``: float64 [users], or [seeds, users]."""
        return self.intervals({"": values})[""]

    def intervals(self, values: Mapping[str, Floats]) -> dict[str, Interval]:
        """The same for each metric; float64 [users] or [seeds, users], alike in shape."""
        if not values:
            return {}
        table = np.stack([np.atleast_2d(one) for one in values.values()], axis=-1)  # [seeds, users, metrics]
        seeds, users, metrics = table.shape
        if users != self.users:
            raise ValueError(f"figures of {users} users for a bootstrap of {self.users}")
        means = np.concatenate(
            [
                np.tensordot(counts / np.float64(users), table, axes=(1, 1))
                for counts in np.array_split(self._counts, max(1, self.resamples // 100))
            ]
        )  # [resamples, seeds, metrics]
        resampled = np.einsum("rs,rsm->rm", self._of_seeds(seeds), means)
        outside = (1.0 - self.confidence) / 2
        low, high = np.quantile(resampled, [outside, 1 - outside], axis=0)
        centre = table.mean(axis=(0, 1))
        return {
            name: Interval(float(centre[i]), float(low[i]), float(high[i]))
            for i, name in zip(range(metrics), values, strict=True)
        }

    def differences(self, mine: Mapping[str, Floats], other: Mapping[str, Floats]) -> dict[str, Interval]:
        """``mine - other`` for each metric that both have, user by user."""
        return self.intervals({name: mine[name] - other[name] for name in mine if name in other})

    @cached_property
    def _counts(self) -> npt.NDArray[np.uint16]:
        """[resamples, users] how often each user was drawn; rows sum to ``users``."""
        random = np.random.default_rng([self.seed, self.users])
        counts = np.empty((self.resamples, self.users), dtype=np.uint16)
        for row in counts:
            row[:] = np.bincount(random.integers(0, self.users, size=self.users), minlength=self.users)
        return counts

    def _of_seeds(self, seeds: int) -> Floats:
        """[resamples, seeds] the share of each seed in each resample."""
        random = np.random.default_rng([self.seed, self.users, seeds])
        drawn = random.integers(0, seeds, size=(self.resamples, seeds))
        counts = (drawn[:, :, None] == np.arange(seeds)).sum(axis=1)
        return np.asarray(counts / seeds, dtype=np.float64)
