"""What goes into a recommendation and what comes out of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class UserContext:
    """What a recommendation needs to know of a user."""

    user_id: str
    history: tuple[str, ...] = ()
    """Item ids, oldest first; the last 20 that have an SCID make the prompt."""
    seen: frozenset[str] = frozenset()
    """Items that are left out of the list."""


@dataclass(frozen=True)
class Recommendation:
    """One place of a list."""

    item_id: str
    score: float
    """log pi(item | prompt), natural logarithm; for source "popularity" the log of the item's share there."""
    position: int
    """1 = first."""
    propensity: float | None
    """Sampled lists: probability of this item at this position given the positions before it; else none."""
    source: Literal["policy", "popularity"]


@dataclass(frozen=True)
class Eligible:
    """A set of items worked out once for many calls (``Policy.eligible``)."""

    mask: NDArray[np.bool_]
    """[n_items] by codec row."""
    alive: "torch.Tensor"
    """int64 [n_items + 1] on the policy's device: prefix sums over the trie's leaves."""
