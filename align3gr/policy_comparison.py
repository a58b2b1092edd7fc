"""``align3gr policy compare A B``: the same users, cases and catalogue for both, and what each would show.

Figures are those of ``align3gr evaluate`` (full catalogue ranked, seen items left out; win rate within logged
slates), each with the interval that holds 95% of the bootstrap resamples of users; differences are B - A,
user by user. Overlap is over the lists that both give the same users now.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from features.errors import BadInput
from policies.ledger import PromotionLedger
from policies.policy import Policy, Recommendation, UserContext
from policies.registry import Registry
from trainer.cases import RankingCase
from trainer.comparison import Comparison
from trainer.metrics import Bootstrap, Interval
from trainer.slates import SlateCase, win_rates

from .cases import gate_cases
from .contexts import contexts_of, listed_titles

if TYPE_CHECKING:
    from align3gr.settings import Settings

Floats = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]

LISTS = 300
"""At most so many users' lists are compared: the interval of their overlap is a few per cent wide."""
EXAMPLES = 6
_COLUMN = "unseen"
_CUTOFFS = (10, 50)
_MIN_SLICE = 5


@dataclass(frozen=True)
class Figure:
    """One metric of both policies over the same users: [mean, low, high]."""

    metric: str
    users: int
    a: list[float]
    b: list[float]
    difference: list[float]
    slice: str = "all users"


@dataclass(frozen=True)
class Overlap:
    """How alike the lists are."""

    users: int
    k: int
    jaccard: list[float]
    """Items in both lists over items in either: [mean, low, high] over users."""
    same_first: float
    """Share of users whose first item is the same."""
    identical: float
    """Share of users whose lists are the same, in order."""
    items_a: int
    items_b: int
    """Distinct items in all lists of each."""
    more_in_b: list[dict[str, Any]]
    """Items that B shows to more users than A, most first: item_id, title, a, b."""
    more_in_a: list[dict[str, Any]]


@dataclass(frozen=True)
class Shown:
    """One place of a list."""

    item_id: str
    title: str
    place_in_other: int | None
    """None: not in the other's list."""


@dataclass(frozen=True)
class Example:
    """Both lists of one user."""

    user_id: str
    history: list[str]
    """Titles (ids without one), latest last."""
    a: list[Shown]
    b: list[Shown]


@dataclass(frozen=True)
class PolicyComparison:
    """All that a page, a table or JSON shows."""

    a: dict[str, Any]
    b: dict[str, Any]
    figures: list[Figure]
    slices: list[Figure]
    overlap: Overlap
    examples: list[Example]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def compare(
    settings: "Settings",
    first: str,
    second: str,
    *,
    user: str | None = None,
    k: int = 10,
    device: str = "cpu",
    progress: Progress | None = None,
) -> PolicyComparison:
    """Measure two registered policies on the gate users, and put their lists side by side.

    ``user``: the example shown, in place of those whose lists differ most. Raises UnknownPolicy,
    PolicyRefused, LogMissing, BadInput (the same policy twice, a user that nobody knows).
    """
    if first == second:
        raise BadInput(f"{first} and {second} are one policy; name two, see align3gr policy list")
    registry = Registry(settings.home, settings.policies.registry)
    paths = registry.path(first), registry.path(second)
    if user is not None and contexts_of(settings, [user])[1]:
        raise BadInput(f"user {user!r} has no feedback yet: check the id")
    slates, ranking, notes = _cases(settings)
    titles, eligible = listed_titles(settings)
    names = sorted({case.user_id for case in slates} | {case.user_id for case in ranking})[:LISTS]
    contexts, _ = contexts_of(settings, [*names, *([user] if user is not None and user not in names else [])])
    beam = settings.policies.decoding.beam
    cutoffs = tuple(cutoff for cutoff in _CUTOFFS if cutoff <= beam) or (beam,)
    ranked = Comparison(ranking, (beam,), cutoffs, (_COLUMN,), eligible=eligible)
    lists: list[list[list[Recommendation]]] = []
    rates: list[dict[str, float]] = []
    base: Policy | None = None
    for path in paths:
        policy = Policy.load(path, device=device, settings=settings.policies.decoding, share_base_with=base)
        base = base or policy
        if ranking:
            ranked.measure(policy, progress=progress)
        rates.append(win_rates(policy, slates, progress=progress) if slates else {})
        lists.append(policy.recommend(contexts, k, eligible=eligible))
    users, per_user = _per_user(ranked, rates)
    return PolicyComparison(
        a=_described(settings, registry, first),
        b=_described(settings, registry, second),
        figures=_figures(users, per_user, "all users"),
        slices=_slices(users, per_user, contexts, ranking),
        overlap=_overlap(contexts, lists, titles, k),
        examples=_examples(contexts, lists, titles, user),
        notes=notes,
    )


def _cases(settings: "Settings") -> tuple[list[SlateCase], list[RankingCase], list[str]]:
    try:
        slates, ranking = gate_cases(settings)
    except BadInput as error:
        return [], [], [f"no figures: {error}"]
    notes = [] if ranking else ["no like outside of slates: the full catalogue is not judged"]
    return slates, ranking, notes


Pair = tuple[Floats, Floats]


def _per_user(
    ranked: Comparison, rates: Sequence[Mapping[str, float]]
) -> tuple[dict[str, list[str]], dict[str, Pair]]:
    """(metric -> its users, metric -> both policies' values of these)."""
    users: dict[str, list[str]] = {}
    values: dict[str, Pair] = {}
    if len(ranked.rows) == 2:
        a, b = (row.figures for row in ranked.rows)
        for metric in a.per_user:
            users[metric] = list(a.users)
            values[metric] = a.per_user[metric], b.per_user[metric]
    both = sorted(set(rates[0]) & set(rates[1]))
    if both:
        users["slate win rate"] = both
        a_rates, b_rates = (np.array([one[user] for user in both]) for one in rates)
        values["slate win rate"] = a_rates, b_rates
    return users, values


def _figures(users: Mapping[str, Sequence[str]], values: Mapping[str, Pair], name: str) -> list[Figure]:
    found = []
    for metric, (a, b) in values.items():
        bootstrap = Bootstrap(len(users[metric]))
        means = bootstrap.intervals({"a": a, "b": b, "difference": b - a})
        found.append(
            Figure(
                metric=metric,
                users=len(users[metric]),
                a=_three(means["a"]),
                b=_three(means["b"]),
                difference=_three(means["difference"]),
                slice=name,
            )
        )
    return found


def _slices(
    users: Mapping[str, list[str]],
    values: Mapping[str, Pair],
    contexts: Sequence[UserContext],
    ranking: Sequence[RankingCase],
) -> list[Figure]:
    """By length of the history, and by how popular what a user came to like is."""
    lengths = {context.user_id: float(len(context.history)) for context in contexts}
    counts = Counter(case.target for case in ranking)
    taste: dict[str, list[int]] = {}
    for case in ranking:
        taste.setdefault(case.user_id, []).append(counts[case.target])
    tastes = {user: float(np.mean(found)) for user, found in taste.items()}
    parts = {
        **_halves(lengths, "short histories", "long histories"),
        **_halves(tastes, "niche taste", "mainstream taste"),
    }
    found: list[Figure] = []
    for name, members in parts.items():
        for metric, (a, b) in values.items():
            rows = [row for row, user in enumerate(users[metric]) if user in members]
            if len(rows) >= _MIN_SLICE:
                kept = {metric: [users[metric][row] for row in rows]}
                found += _figures(kept, {metric: (a[rows], b[rows])}, name)
    return found


def _halves(measured: Mapping[str, float], low: str, high: str) -> dict[str, set[str]]:
    if not measured:
        return {}
    middle = float(np.median(list(measured.values())))
    below = {user for user, value in measured.items() if value <= middle}
    return {low: below, high: set(measured) - below}


def _overlap(
    contexts: Sequence[UserContext],
    lists: Sequence[Sequence[Sequence[Recommendation]]],
    titles: Mapping[str, str],
    k: int,
) -> Overlap:
    a, b = ([[one.item_id for one in found] for found in side] for side in lists)
    shares = np.array([_jaccard(*pair) for pair in zip(a, b, strict=True)])
    shown_a, shown_b = (Counter(item for found in side for item in found) for side in (a, b))
    gained = {item: shown_b[item] - shown_a[item] for item in {*shown_a, *shown_b}}

    def most(sign: int) -> list[dict[str, Any]]:
        moved = (item for item in gained if sign * gained[item] > 0)
        order = sorted(moved, key=lambda item: (-sign * gained[item], item))
        return [
            {"item_id": item, "title": titles.get(item, ""), "a": shown_a[item], "b": shown_b[item]}
            for item in order[:5]
        ]

    empty = not len(shares)
    return Overlap(
        users=len(contexts),
        k=k,
        jaccard=[0.0, 0.0, 0.0] if empty else _three(Bootstrap(len(shares)).interval(shares)),
        same_first=0.0 if empty else float(np.mean([x[:1] == y[:1] for x, y in zip(a, b, strict=True)])),
        identical=0.0 if empty else float(np.mean([x == y for x, y in zip(a, b, strict=True)])),
        items_a=len(shown_a),
        items_b=len(shown_b),
        more_in_b=most(1),
        more_in_a=most(-1),
    )


def _jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    either = set(a) | set(b)
    return len(set(a) & set(b)) / len(either) if either else 1.0


def _examples(
    contexts: Sequence[UserContext],
    lists: Sequence[Sequence[Sequence[Recommendation]]],
    titles: Mapping[str, str],
    user: str | None,
) -> list[Example]:
    """The one user asked for, or those whose lists have least in common."""
    ids = [[[one.item_id for one in found] for found in side] for side in lists]
    rows = list(range(len(contexts)))
    if user is not None:
        rows = [row for row in rows if contexts[row].user_id == user]
    else:
        rows.sort(key=lambda row: (_jaccard(ids[0][row], ids[1][row]), contexts[row].user_id))
    return [
        Example(
            user_id=contexts[row].user_id,
            history=[titles.get(item, item) for item in contexts[row].history],
            a=_shown(ids[0][row], ids[1][row], titles),
            b=_shown(ids[1][row], ids[0][row], titles),
        )
        for row in rows[:EXAMPLES]
    ]


def _shown(mine: Sequence[str], other: Sequence[str], titles: Mapping[str, str]) -> list[Shown]:
    places = {item: place for place, item in enumerate(other, start=1)}
    return [Shown(item, titles.get(item, ""), places.get(item)) for item in mine]


def _described(settings: "Settings", registry: Registry, version: str) -> dict[str, Any]:
    ledger = PromotionLedger(settings.home / "ledger")
    manifest = registry.show(version)
    lineage = manifest.get("lineage") or {}
    return {
        "version": version,
        "kind": manifest.get("kind"),
        "parent": lineage.get("parent"),
        "round_id": lineage.get("round_id"),
        "dataset_id": lineage.get("dataset_id"),
        "created_at": lineage.get("created_at"),
        "reference": ledger.reference() == version,
    }


def _three(one: Interval) -> list[float]:
    return [one.mean, one.low, one.high]
