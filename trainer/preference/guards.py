"""Guards: did a stage do harm? The same held-out cases before and after it, and bounds on what may be lost.

What goes wrong in published preference training is measured here: Recall@50 falls while Recall@1 rises,
lists shrink to fewer and more popular items, and the held-out answers lose probability together with the
rejected ones that resemble them (likelihood displacement). A stage that breaks a bound is not built upon.

``measure_guards`` is figures of one policy, ``broken`` compares two and says in sentences what is broken.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.policy import Policy
from trainer.cases import RankingCase
from trainer.evaluation import Progress, rank_catalogue
from trainer.settings import GuardSettings
from trainer.slates import log_probs

NDCG_AT, RECALL_AT = 10, 50
_AT_ONCE = 256
_AS_NOTHING = 1e-9  # rounding of means is no loss


@dataclass(frozen=True)
class GuardFigures:
    """One policy on the held-out cases."""

    users: int
    ndcg: float
    """NDCG@10, mean over users."""
    recall: float
    """Recall@50, likewise."""
    coverage: float
    """Share of the eligible catalogue in some list of ten, 0..1."""
    popularity: float
    """Mean popularity percentile of the places of these lists, 0..1."""
    chosen_log_prob: float
    """Mean log pi of the held-out item, in nats."""
    validity: float
    """Share of lists that are complete, unique, eligible and unseen, 0..1."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a state file or a report, under the names of trainer.evaluation."""
        return {
            "users": self.users,
            f"ndcg@{NDCG_AT}": self.ndcg,
            f"recall@{RECALL_AT}": self.recall,
            "coverage": self.coverage,
            "popularity": self.popularity,
            "chosen_log_prob": self.chosen_log_prob,
            "validity": self.validity,
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> "GuardFigures":
        """What ``as_dict`` gave."""
        names = ("coverage", "popularity", "chosen_log_prob", "validity")
        return cls(
            facts["users"],
            facts[f"ndcg@{NDCG_AT}"],
            facts[f"recall@{RECALL_AT}"],
            *(facts[name] for name in names),
        )


def measure_guards(
    policy: Policy,
    cases: Sequence[RankingCase],
    *,
    eligible: Collection[str] | None = None,
    popularity: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> GuardFigures:
    """Rank the catalogue for ``cases`` by a beam of 50, and read the probability of their targets.

    ``popularity``: the items, most popular first, the same for policies that are compared; default the
    policy's own.
    """
    depth = min(NDCG_AT, len(policy.codec))
    ranked = rank_catalogue(
        policy,
        cases,
        cutoffs=(NDCG_AT, RECALL_AT),
        beam=max(RECALL_AT, policy.settings.beam),
        eligible=eligible,
        popularity=popularity,
        depth=depth,
        progress=progress,
    )
    return GuardFigures(
        users=len(ranked.users),
        ndcg=ranked.means[f"ndcg@{NDCG_AT}"],
        recall=ranked.means[f"recall@{RECALL_AT}"],
        coverage=ranked.coverage,
        popularity=ranked.shape.popularity,
        chosen_log_prob=_chosen(policy, cases),
        validity=ranked.validity,
    )


def guard_cases(cases: Sequence[RankingCase], settings: GuardSettings) -> list[RankingCase]:
    """The cases of ``settings.users`` users, always the same; nothing below ``settings.min_users`` users."""
    names = sorted({case.user_id for case in cases})
    if len(names) < settings.min_users:
        return []
    kept = np.random.default_rng(0).permutation(len(names))[: settings.users]
    chosen = {names[place] for place in kept}
    return [case for case in cases if case.user_id in chosen]


def broken(before: GuardFigures, after: GuardFigures, bounds: GuardSettings) -> list[str]:
    """A sentence for each bound that ``after`` breaks against ``before``; none: the stage did no harm."""
    found = [
        _loss(f"NDCG@{NDCG_AT}", before.ndcg, after.ndcg, bounds.ndcg_loss),
        _loss(f"Recall@{RECALL_AT}", before.recall, after.recall, bounds.recall_loss),
        _loss("coverage", before.coverage, after.coverage, bounds.coverage_loss),
        _change(
            "the mean popularity of what is recommended rose",
            after.popularity - before.popularity,
            bounds.popularity_rise,
            before.popularity,
            after.popularity,
        ),
        _change(
            "the held-out items lost log-probability",
            before.chosen_log_prob - after.chosen_log_prob,
            bounds.chosen_drift,
            before.chosen_log_prob,
            after.chosen_log_prob,
        ),
    ]
    if after.validity < bounds.validity:
        found.append(f"only {after.validity:.2%} of the lists are valid; must be {bounds.validity:.2%}")
    return [sentence for sentence in found if sentence is not None]


def _loss(name: str, before: float, after: float, bound: float) -> str | None:
    """In words, when ``after`` is below what may be lost of ``before``."""
    if after >= before * (1 - bound) - _AS_NOTHING:
        return None
    share = 1 - after / before
    return f"{name} fell by {share:.1%}, from {before:.4f} to {after:.4f}; {bound:.1%} is allowed"


def _change(what: str, change: float, bound: float, before: float, after: float) -> str | None:
    if change <= bound + _AS_NOTHING:
        return None
    return f"{what} by {change:.4f}, from {before:.4f} to {after:.4f}; {bound:.4f} is allowed"


def _chosen(policy: Policy, cases: Sequence[RankingCase]) -> float:
    """Mean log pi of the targets that the codec knows and that have a prompt; 0 without any."""
    known = [
        case for case in cases if case.target in policy.codec.items and policy.tokens.known(case.history)
    ]
    known.sort(key=lambda case: len(case.history))
    found: list[float] = []
    for start in range(0, len(known), _AT_ONCE):
        part = known[start : start + _AT_ONCE]
        scores = log_probs(policy, [(case.history, [case.target]) for case in part])
        found += [float(one[0]) for one in scores]
    return float(np.mean(found)) if found else 0.0
