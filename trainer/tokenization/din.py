"""Collaborative embeddings by DIN: what a user's past says about an item (Zhou et al., KDD 2018).

A candidate t is scored from the user's behaviours h_1 .. h_n through target attention,

    interest(t) = sum_j a(h_j, t) h_j,      logit(t) = f([interest, t, interest * t]) + s interest . t + b_t,

with ``a`` the activation unit of ``policies.users``, f a small MLP and s a learned scale. (The product is
ours: on 22,000 sparse histories the MLP alone stayed below popularity, AUC .67 against .69.) The loss is a
softmax over the item met next and sampled negatives that the user never met (the published code of Align3GR:
60); the negatives of a step are shared by its users, so that all attention is one matrix product. Embeddings
have length 1. Frozen afterwards: the item's embedding is its collaborative vector, and a user's is the
interest in the latest item.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from policies.users import InterestAttention
from policies.weights import device_named
from trainer.checkpoint import Checkpoint

from .interactions import IntArray, Interactions, batches

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (epochs done, epochs in all)."""


@dataclass(frozen=True)
class DinTraining:
    """How it is trained; see TokenizationSettings for the meaning."""

    dimension: int
    attention: int
    epochs: int
    batch: int
    negatives: int
    learning_rate: float


@dataclass(frozen=True)
class Collaborative:
    """What the collaborative encoder gives, frozen."""

    items: FloatArray
    """[n_items, d], each of length 1, or zero for an item nobody met in training."""
    attention: InterestAttention | None
    """How a user's interest is pooled; none: a plain mean."""
    losses: tuple[float, ...] = ()
    """Mean loss of each epoch, nats."""


class Din(nn.Module):
    """The model; a forward scores candidates that all users of a batch share, and one of each user's own."""

    def __init__(self, n_items: int, training: DinTraining) -> None:
        super().__init__()
        d, m = training.dimension, training.attention
        self.items = nn.Embedding(n_items, d)
        nn.init.normal_(self.items.weight, std=0.1)
        self.bias = nn.Embedding(n_items, 1)
        nn.init.zeros_(self.bias.weight)
        self.unit = nn.Linear(3 * d, m)
        self.unit_out = nn.Linear(m, 1)
        nn.init.constant_(self.unit_out.bias, 0.3)  # before it has learned, the interest is a plain sum
        self.head = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 1))
        self.sharpness = nn.Parameter(torch.tensor(5.0))

    def vectors(self, rows: Tensor) -> Tensor:
        """[...] item rows -> [..., d] of length 1."""
        return F.normalize(self.items(rows), dim=-1)

    def interest(self, behaviours: Tensor, owner: Tensor, users: int, targets: Tensor) -> Tensor:
        """[N, d] behaviours of all users, int64 [N] whose they are, [C, d] -> [users, C, d].

        Each user's interest in each of the shared targets. With a shared target the unit's first layer is
        linear in the behaviour, so that all pairs are one matrix product.
        """
        weight = self.unit.weight.T  # [3d, m]
        d, m = behaviours.shape[-1], weight.shape[1]
        mixed = targets.T[:, :, None] * weight[2 * d :, None] + weight[:d, None]  # [d, C, m]
        constant = targets @ weight[d : 2 * d] + self.unit.bias  # [C, m]
        inner = torch.addmm(constant.flatten(), behaviours, mixed.flatten(1)).relu_()
        scores: Tensor = self.unit_out(inner.view(len(behaviours), len(targets), m))  # [N, C, 1]
        weighted = scores * behaviours[:, None]
        return weighted.new_zeros(users, len(targets), d).index_add_(0, owner, weighted)

    def own_interest(self, behaviours: Tensor, owner: Tensor, targets: Tensor) -> Tensor:
        """[N, d], int64 [N], [B, d] -> [B, d]: each user's interest in a target of its own."""
        own = targets[owner]
        inner = self.unit(torch.cat([behaviours, own, behaviours * own], dim=-1))
        weighted = self.unit_out(torch.relu(inner)) * behaviours
        return torch.zeros_like(targets).index_add_(0, owner, weighted)

    def score(self, interest: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        """Logits [...] of targets [..., d] with their interest [..., d] and item rows [...]."""
        features = torch.cat([interest, targets, interest * targets], dim=-1)
        product = self.sharpness * (interest * targets).sum(-1)
        logits: Tensor = self.head(features).squeeze(-1) + product + self.bias(rows).squeeze(-1)
        return logits

    def forward(self, past: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        """Item rows [B, H] (-1 behind), [B], [C] -> logits [B, 1 + C], the positive's first."""
        owner, at = torch.nonzero(past >= 0, as_tuple=True)
        behaviours = self.vectors(past[owner, at])
        own, shared = self.vectors(positive), self.vectors(negatives)
        first = self.score(self.own_interest(behaviours, owner, own), own, positive)
        interest = self.interest(behaviours, owner, len(past), shared)
        others = self.score(interest, shared.expand_as(interest), negatives.expand(len(past), -1))
        return torch.cat([first[:, None], others], dim=1)


def din_loss(logits: Tensor, met: Tensor) -> Tensor:
    """Softmax over the positive (column 0) and the negatives [B, 1 + C] that ``met`` bool [B, C] leaves."""
    barred = F.pad(met, (1, 0), value=False)
    filled = logits.masked_fill(barred, float("-inf"))
    return F.cross_entropy(filled, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def train_din(
    interactions: Interactions,
    training: DinTraining,
    *,
    seed: int,
    device: str = "cpu",
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Collaborative:
    """Fit on the training pairs; an epoch is one pair of each user, drawn anew. Same seed: same result (CPU).

    A checkpoint after each epoch; a resumed training equals an uninterrupted one. An item of no training pair
    and no history gets the zero vector.
    """
    place = device_named(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Din(interactions.n_items, training).to(place)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=1e-5)
    kept = checkpoint or Checkpoint(None, "")
    done, losses = 0, list[float]()
    if (saved := kept.load(place)) is not None:
        model.load_state_dict(saved.states["model"])
        optimizer.load_state_dict(saved.states["optimizer"])
        done, losses = int(saved.facts["epoch"]), list(saved.facts["losses"])
    for epoch in range(done, training.epochs):
        rng = np.random.default_rng([seed, epoch, 3])
        places = one_pair_a_user(interactions, rng)
        rate = 0.5 * (1 + np.cos(np.pi * epoch / training.epochs))
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * max(float(rate), 0.05)
        total = 0.0
        for batch in batches(len(places), training.batch, seed=seed, epoch=epoch):
            total += _step(model, optimizer, interactions, places[batch], training.negatives, rng) * len(
                batch
            )
        losses.append(total / max(len(places), 1))
        states: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        kept.save({"epoch": epoch + 1, "losses": losses}, states)
        if progress is not None:
            progress(epoch + 1, training.epochs)
    return _frozen(model.cpu().eval(), interactions, tuple(losses))


def one_pair_a_user(interactions: Interactions, rng: np.random.Generator) -> IntArray:
    """A place of each user that has one to train on, drawn evenly."""
    pairs = interactions.pairs
    owner = interactions.owner[pairs]
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    counts = np.diff(np.append(first, len(pairs)))
    return pairs[first + (rng.random(len(first)) * counts).astype(np.int64)]


def _step(
    model: Din,
    optimizer: torch.optim.Optimizer,
    interactions: Interactions,
    places: IntArray,
    negatives: int,
    rng: np.random.Generator,
) -> float:
    drawn = rng.integers(interactions.n_items, size=negatives)
    met = interactions.met(interactions.owner[places], drawn)
    device = model.items.weight.device
    past, positive, shared, barred = (
        torch.from_numpy(array).to(device)
        for array in (interactions.before(places), interactions.flat[places], drawn, met)
    )
    loss = din_loss(model(past, positive, shared), barred)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _frozen(model: Din, interactions: Interactions, losses: tuple[float, ...]) -> Collaborative:
    met = np.zeros(interactions.n_items, dtype=np.bool_)
    trained = np.ones(len(interactions.flat), dtype=np.bool_)
    trained[interactions.watched] = False
    met[interactions.flat[trained]] = True
    vectors = model.vectors(torch.arange(interactions.n_items)).numpy() * met[:, None]
    attention = InterestAttention(
        hidden=np.ascontiguousarray(model.unit.weight.numpy().T),
        bias=model.unit.bias.numpy().copy(),
        out=model.unit_out.weight.numpy()[0].copy(),
        offset=model.unit_out.bias.numpy().copy(),
    )
    return Collaborative(vectors.astype(np.float32), attention, losses)
