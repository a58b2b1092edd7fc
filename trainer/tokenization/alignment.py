"""Behaviour alignment: the SC encoders and the U2I loss (Align3GR, section 1; paper.md).

A user and an item are close when the user takes the item. With u and v what the SC encoders make of a user's
and an item's [semantic | collaborative] vectors, in-batch negatives and N_u the items of the batch that u
never met:

    L_U2I = -1/|B| sum_u log( exp(u.v+) / (exp(u.v+) + sum_{j in N_u} exp(u.v_j)) )

With ``log_q`` the logits are corrected by -log q(j), the rate at which j comes as an in-batch negative (Yi et
al., "Sampling-bias-corrected neural modeling", RecSys 2019): popular items are over-sampled as negatives.
"""

from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .interactions import IntArray, Interactions

FloatArray = npt.NDArray[np.float32]

WATCH_NEGATIVES = 100
"""Items never met that each held-out item is compared with."""


def u2i_loss(users: Tensor, items: Tensor, met: Tensor, log_q: Tensor | None = None) -> Tensor:
    """Mean over the batch, a scalar.

    ``users``, ``items``: [B, s], row b of ``items`` is what user b took. ``met``: bool [B, B], True where
    user b met item j (the diagonal is the positive and always counts). ``log_q``: [B], natural logarithm.
    """
    logits = users @ items.T
    if log_q is not None:
        logits = logits - log_q
    own = torch.eye(len(users), dtype=torch.bool, device=users.device)
    logits = logits.masked_fill(met & ~own, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(users), device=users.device))


class ScEncoder(nn.Module):
    """[semantic | collaborative] vectors -> u or v; a perceptron, as in the paper.

    Inputs are shifted and scaled first by constants.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, widths: tuple[int, ...], mean: FloatArray, scale: FloatArray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean))
        self.register_buffer("scale", torch.from_numpy(scale))
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [nn.ReLU()] * bool(i) + [nn.Linear(inputs, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[n, widths[0]] -> [n, widths[-1]]."""
        out: Tensor = self.layers((x - self.mean) / self.scale)
        return out


@dataclass(frozen=True)
class Watched:
    """How well held-out pairs are told from others, at one moment of training."""

    auc: float
    """P(u.v of the item taken > u.v of an item never met); ties count half."""
    recall_at_10: float
    """Share of held-out items among the ten best of the whole catalogue, met items left out."""

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


class Watch:
    """The held-out pairs, with negatives drawn once: what is measured between epochs is comparable."""

    def __init__(self, interactions: Interactions, *, seed: int) -> None:
        rng = np.random.default_rng([seed, 5])
        self.places = interactions.watched
        self.users: IntArray = interactions.owner[self.places]
        self.positive: IntArray = interactions.flat[self.places]
        drawn = rng.integers(interactions.n_items, size=WATCH_NEGATIVES)
        self.negatives: IntArray = drawn
        everything = np.arange(interactions.n_items)
        self._met = torch.from_numpy(interactions.met(self.users, everything))
        self._barred = self._met[:, torch.from_numpy(drawn)]

    def __len__(self) -> int:
        return len(self.places)

    @torch.no_grad()
    def measure(self, users: Tensor, items: Tensor) -> Watched:
        """``users`` [w, s] of the held-out pairs' users before the pair, ``items`` [n_items, s]."""
        if len(self) == 0:
            return Watched(0.5, 0.0)
        users, items = users.cpu().float(), items.cpu().float()
        positive = torch.from_numpy(self.positive)
        scores = users @ items.T
        own = scores.gather(1, positive[:, None])
        others = scores[:, torch.from_numpy(self.negatives)]
        wins = (own > others).float() + 0.5 * (own == others).float()
        allowed = (~self._barred).float()
        auc = float(((wins * allowed).sum(1) / allowed.sum(1).clamp(min=1)).mean())
        scores = scores.masked_fill(self._met, float("-inf")).scatter_(1, positive[:, None], own)
        better = (scores > own).sum(1)
        return Watched(auc, float((better < 10).float().mean()))
