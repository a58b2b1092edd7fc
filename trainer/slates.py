"""Ranking within a logged slate: does log pi put what was liked above the rest of the same slate?

The win rate is the share of (liked, other) pairs that log pi orders rightly, ties half.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from policies.policy import Policy
from policies.prompt import answer_ids, prompts_ids
from policies.scoring import answer_log_probs, pack

Floats = npt.NDArray[np.float64]

SLATES_AT_ONCE = 64
"""Slates scored in one forward pass; bounds memory, changes no result."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, in all)."""


@dataclass(frozen=True)
class SlateCase:
    """A logged slate with the levels in force."""

    user_id: str
    history: tuple[str, ...]
    items: tuple[str, ...]
    levels: tuple[int | None, ...]
    """1 liked, 0 neutral, -1 disliked; none: nothing is known of it, it is left out."""


@dataclass(frozen=True)
class JudgedSlate:
    """How a policy ranks one slate: each liked item against the others that were not liked."""

    user_id: str
    liked: tuple[str, ...]
    shares: Floats
    """float64 [liked]: share of the others that log pi puts below the liked item, ties half."""


def win_rates(
    policy: Policy, slates: Sequence[SlateCase], *, progress: Progress | None = None
) -> dict[str, float]:
    """User -> mean win rate over that user's slates; users without a liked and another item are absent.

    Items without a level and items that the codec does not know are left out of their slate.
    """
    return mean_win_rates(judged_slates(policy, slates, progress=progress))


def mean_win_rates(judged: Sequence[JudgedSlate]) -> dict[str, float]:
    """User -> mean win rate over that user's slates."""
    rates: dict[str, list[float]] = {}
    for one in judged:  # pairs of a slate: as many for each liked item, so the mean of means is theirs
        rates.setdefault(one.user_id, []).append(float(one.shares.mean()))
    return {user: float(np.mean(values)) for user, values in rates.items()}


def judged_slates(
    policy: Policy, slates: Sequence[SlateCase], *, progress: Progress | None = None
) -> list[JudgedSlate]:
    """The slates that hold a liked and another item that the codec knows, long histories first."""
    kept = [
        (case, items, liked)
        for case in slates
        for items, liked in [_known(policy, case)]
        if 0 < sum(liked) < len(liked)
    ]
    kept.sort(key=lambda entry: len(entry[0].history), reverse=True)  # rows of a batch of like length
    found = []
    for start in range(0, len(kept), SLATES_AT_ONCE):
        part = kept[start : start + SLATES_AT_ONCE]
        scores = log_probs(policy, [(case.history, items) for case, items, _ in part])
        for (case, items, liked), row in zip(part, scores, strict=True):
            mask = np.array(liked)
            names = tuple(item for item, one in zip(items, liked, strict=True) if one)
            found.append(JudgedSlate(case.user_id, names, win_shares(row, mask)))
        if progress is not None:
            progress("slates", min(start + SLATES_AT_ONCE, len(kept)), len(kept))
    return found


def win_shares(scores: Floats, liked: npt.NDArray[np.bool_]) -> Floats:
    """For each liked item the share of the others with a lower score, ties half; [n], [n] -> [liked]."""
    difference = scores[liked][:, None] - scores[~liked][None, :]
    return np.asarray(((difference > 0) + 0.5 * (difference == 0)).mean(axis=1))


def win_rate(scores: Floats, liked: npt.NDArray[np.bool_]) -> float:
    """Share of pairs (liked, other) with score(liked) > score(other), ties half; [n], [n] -> 0..1."""
    return float(win_shares(scores, liked).mean())


@torch.inference_mode()
def log_probs(policy: Policy, asked: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Floats]:
    """log pi of items given a history, for each (history, items); one forward pass, float64 [items] each."""
    tokens = policy.tokens
    batch = pack(
        prompts_ids(tokens, [history for history, _ in asked]),
        [[answer_ids(tokens, item) for item in items] for _, items in asked],
        tokens.pad,
    ).to(policy.device)
    scores = answer_log_probs(policy.model, batch).double().cpu().numpy()
    return [row[: len(items)] for row, (_, items) in zip(scores, asked, strict=True)]


def _known(policy: Policy, case: SlateCase) -> tuple[list[str], list[bool]]:
    pairs = [
        (item, level == 1)
        for item, level in zip(case.items, case.levels, strict=True)
        if level is not None and item in policy.codec.items
    ]
    return [item for item, _ in pairs], [liked for _, liked in pairs]
