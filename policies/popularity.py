"""What a user nobody knows gets: the most popular items, or a draw among them with its propensity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .codec import ScidCodec


@dataclass(frozen=True)
class Popular:
    """Items of one list, first place first."""

    rows: NDArray[np.int64]
    """[k] of the codec."""
    log_shares: NDArray[np.float64]
    """[k] log q(item)."""
    propensities: NDArray[np.float64] | None = None
    """[k], for a draw: probability at this position given the positions before it."""


class Popularity:
    """``q(item)`` proportional to 1 / rank among the items a user may get; rank 1 is the most liked."""

    def __init__(self, codec: ScidCodec, item_ids: Sequence[str]) -> None:
        """``item_ids``: most liked first; items it does not name follow in the codec's order."""
        items = codec.items
        named = [items[item_id] for item_id in dict.fromkeys(item_ids) if item_id in items]
        others = np.ones(len(codec), dtype=bool)
        others[named] = False
        self._order = np.concatenate([np.array(named, dtype=np.int64), np.flatnonzero(others)])
        self._harmonic = np.concatenate([[1.0], np.cumsum(1 / np.arange(1, len(codec) + 1))])

    def top(self, allowed: NDArray[np.bool_], k: int) -> Popular:
        """The k most popular of the allowed items (``allowed`` [n_items] by codec row)."""
        count = int(np.count_nonzero(allowed))
        rows, scanned = np.empty(0, dtype=np.int64), 4 * k
        while len(rows) < min(k, count):  # the first k allowed, without looking at a million
            head = self._order[:scanned]
            rows, scanned = head[allowed[head]][:k], 4 * scanned
        shares = 1 / np.arange(1, len(rows) + 1)
        return Popular(rows, np.log(shares / self._harmonic[count]))

    def draw(self, allowed: NDArray[np.bool_], k: int, key: int) -> Popular:
        """k of the allowed items without replacement: Gumbel top-k, as ``policies.decoding`` draws."""
        rows = self._order[allowed[self._order]]
        log_q = -np.log(np.arange(1, len(rows) + 1) * self._harmonic[len(rows)])
        noise = np.random.Generator(np.random.Philox(key=key)).gumbel(size=len(rows))
        order = np.argsort(-(log_q + noise), kind="stable")
        rows, log_q = rows[order], log_q[order]
        shares = np.exp(log_q)
        remaining = shares[::-1].cumsum()[::-1]
        return Popular(rows[:k], log_q[:k], (shares / remaining)[:k])
