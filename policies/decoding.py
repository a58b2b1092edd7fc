"""Constrained beam search and sampling over the trie of valid SCIDs; all beams share the prompt's cache.

The prompt of a user is encoded once. All beams of a user are tokens of *one* row behind it: which of them is
whose ancestor stands in the attention mask, so the key-value cache is never copied per beam and never
reordered. Only children that exist are scored, and only those with an item left below them that this user may
get: a beam can never end on a seen or ineligible item, so k items come back whenever k are eligible.

Scores are log pi(y|x) with the full-vocabulary normaliser, as in ``policies.scoring``.

**Sampling** draws a slate without replacement by Gumbel top-k over items (stochastic beam search; Kool, van
Hoof and Welling, 2019, arXiv 1903.06059). Let ``q`` be the policy's distribution over the items this user
may get, ``q(y) = prod_l softmax over live children (logits_l / temperature)[y_l]`` (it sums to 1 over them).
Every item gets the perturbed log-probability ``G_y = log q(y) + Gumbel noise``; the slate is the k largest,
in order. A subtree's largest G is itself a Gumbel around its log-mass, so G is drawn top-down, a child's
conditioned on its parent's, and the k largest leaves lie under the k largest nodes of every level: a beam of
k is exact, at the price of one beam search. The slate's law is Plackett-Luce: position t shows y_t with
probability

    P(y_t | x, y_1 .. y_{t-1}) = q(y_t) / (1 - q(y_1) - ... - q(y_{t-1})),

the **propensity** that is logged, and the product over positions is the probability of the ordered slate. The
denominator is summed from the items and subtrees not yet shown, never by subtracting from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .attention import attention_argument
from .errors import PoliciesError
from .head import logits_at
from .trie import ScidTrie

NOBODY = -float("inf")


@dataclass(frozen=True)
class DeviceLevel:
    """A ``trie.Level`` as tensors, its codes turned into token ids."""

    token: torch.Tensor
    """int64 [n]"""
    first_leaf: torch.Tensor
    """int64 [n + 1]"""
    first_child: torch.Tensor
    """int64 [m + 1]"""
    widest: int


class DeviceTrie:
    """A trie on the model's device."""

    def __init__(
        self, trie: ScidTrie, tokens: Sequence[NDArray[np.int64]], device: torch.device | str
    ) -> None:
        """``tokens[level][code]`` is a token id."""
        self.levels = tuple(
            DeviceLevel(
                torch.from_numpy(token_of[level.code]).to(device),
                torch.from_numpy(level.first_leaf.astype(np.int64)).to(device),
                torch.from_numpy(level.first_child.astype(np.int64)).to(device),
                level.widest,
            )
            for level, token_of in zip(trie.levels, tokens, strict=True)
        )
        self.item_of_leaf = torch.from_numpy(trie.item_of_leaf.astype(np.int64)).to(device)


@dataclass(frozen=True)
class Left:
    """Which items each of B users may still get."""

    alive: torch.Tensor
    """int64 [n_items + 1]: prefix sums over leaves of the items anybody may get."""
    left_out: torch.Tensor
    """int64 [B, S]: sorted leaves among those that this user may not get; padded with n_items."""

    def below(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """How many items are left in the leaf ranges first .. last, both [B, ...]; int64, same shape."""
        shape = first.shape
        flat_first, flat_last = first.reshape(shape[0], -1), last.reshape(shape[0], -1)
        shared = self.alive[flat_last] - self.alive[flat_first]
        own = torch.searchsorted(self.left_out, flat_last) - torch.searchsorted(self.left_out, flat_first)
        return (shared - own).reshape(shape)


@dataclass(frozen=True)
class Found:
    """What a search found, best (or first drawn) first; item -1 where fewer than k items were left."""

    items: torch.Tensor
    """int64 [B, k], rows of the codec."""
    scores: torch.Tensor
    """float32 [B, k], log pi(y|x)."""
    propensities: torch.Tensor | None = None
    """float64 [B, k], for samples."""


@dataclass(frozen=True)
class _Children:
    """Every child of every front node: [B, W, m] each."""

    node: torch.Tensor
    live: torch.Tensor
    logits: torch.Tensor
    """float32; unnormalised."""
    log_probs: torch.Tensor
    """float32; normalised over the full vocabulary."""


@torch.inference_mode()
def beam_search(
    model: Any,
    trie: DeviceTrie,
    prompts: Sequence[Sequence[int]],
    left: Left,
    *,
    k: int,
    beam: int,
    pad_id: int,
) -> Found:
    """The k best items of each user by log pi. Ties go to the smaller SCID; no randomness.

    ``beam`` prefixes are kept at each level (at least k). Raises PoliciesError when the model computes NaN.
    """
    search = Search(model, trie, prompts, pad_id)
    scores = torch.zeros(len(prompts), 1, device=search.device)
    for level in range(len(trie.levels)):
        children = search.children(level, left)
        total = (scores[:, :, None] + children.log_probs).masked_fill(~children.live, NOBODY).flatten(1)
        keep = min(k if search.is_last(level) else max(beam, k), total.shape[1])
        # A stable sort, not topk: equal scores keep the order of the trie whatever the shapes.
        scores, chosen = total.sort(dim=1, descending=True, stable=True)
        scores, chosen = scores[:, :keep], chosen[:, :keep]
        search.step(level, children, chosen, scores > NOBODY)
    return Found(search.items(), scores)


@torch.inference_mode()
def sample_slates(
    model: Any,
    trie: DeviceTrie,
    prompts: Sequence[Sequence[int]],
    left: Left,
    *,
    k: int,
    keys: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
) -> Found:
    """k items of each user without replacement, with the propensity of each at its position.

    ``keys``: one 128-bit integer a user, the seed of that user's noise and nobody else's. Raises
    PoliciesError when the model computes NaN.
    """
    search = Search(model, trie, prompts, pad_id)
    batch, device = len(prompts), search.device
    noise = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
    scores = torch.zeros(batch, 1, device=device)  # log pi
    log_q = torch.zeros(batch, 1, device=device, dtype=torch.float64)
    perturbed = torch.zeros(batch, 1, device=device, dtype=torch.float64)
    discarded = torch.full((batch, 1), NOBODY, device=device, dtype=torch.float64)  # log-mass not followed
    shown = torch.empty(0)
    for level in range(len(trie.levels)):
        children = search.children(level, left)
        local = (children.logits.double() / temperature).masked_fill(~children.live, NOBODY)
        child_q = log_q[:, :, None] + local - local.logsumexp(dim=2, keepdim=True)
        child_q = child_q.masked_fill(~children.live, NOBODY)
        draws = np.stack([one.gumbel(size=local.shape[1:]) for one in noise])
        gumbel = child_q + torch.from_numpy(draws).to(device)
        child_g = _condition(gumbel, perturbed).masked_fill(~children.live, NOBODY)

        perturbed, order = child_g.flatten(1).sort(dim=1, descending=True, stable=True)
        keep = min(k, order.shape[1])
        chosen = order[:, :keep]
        log_q_all = child_q.flatten(1).gather(1, order)
        log_pi_all = (scores[:, :, None] + children.log_probs).flatten(1)
        if search.is_last(level):
            remaining = torch.cat([log_q_all, discarded], dim=1).flip(1).logcumsumexp(dim=1).flip(1)
            shown = (log_q_all[:, :keep] - remaining[:, :keep]).exp()
        rest = torch.cat([log_q_all[:, keep:], discarded], dim=1)
        discarded = rest.logsumexp(dim=1, keepdim=True)
        perturbed, log_q = perturbed[:, :keep], log_q_all[:, :keep]
        scores = log_pi_all.gather(1, chosen)
        search.step(level, children, chosen, perturbed > NOBODY)
    return Found(search.items(), scores, shown)


class Search:
    """The cache, the front (W nodes a user) and its ancestry, while a search goes down the trie."""

    def __init__(self, model: Any, trie: DeviceTrie, prompts: Sequence[Sequence[int]], pad_id: int) -> None:
        from transformers import DynamicCache

        self.model, self.trie = model, trie
        self.device = trie.item_of_leaf.device
        self.cache = DynamicCache()
        batch, width = len(prompts), max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        index = torch.arange(width, device=self.device)
        real = index >= (width - self.lengths)[:, None]  # [B, P]
        causal = (index[:, None] >= index[None, :]) & real[:, None, :]
        itself = torch.eye(width, dtype=torch.bool, device=self.device)
        positions = (index - (width - self.lengths)[:, None]).clamp(min=0)
        self.key_positions = positions
        self.ancestry = real[:, None, :]  # [B, W, keys so far]: what the front sees
        self.front = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)  # node of each beam
        self.standing = torch.ones(batch, 1, dtype=torch.bool, device=self.device)  # beams that are real
        last = torch.arange(1, batch + 1, device=self.device) * width - 1
        self.logits = self._forward(ids.to(self.device), causal | itself, positions, last)  # [B, W, V]

    def is_last(self, level: int) -> bool:
        """Whether the children at this level are items."""
        return level == len(self.trie.levels) - 1

    def children(self, level: int, left: Left) -> _Children:
        """The children of the front at this level, padded to the widest node's number."""
        nodes = self.trie.levels[level]
        first, last = nodes.first_child[self.front], nodes.first_child[self.front + 1]
        node = first[:, :, None] + torch.arange(nodes.widest, device=self.device)
        exists = (node < last[:, :, None]) & self.standing[:, :, None]
        node = torch.where(exists, node, 0)
        live = exists & (left.below(nodes.first_leaf[node], nodes.first_leaf[node + 1]) > 0)
        logits = self.logits.gather(2, nodes.token[node])
        normaliser = self.logits.logsumexp(dim=2, keepdim=True)
        if not normaliser.isfinite().all():
            raise PoliciesError("the policy computes no probabilities but NaN; roll back to another policy")
        return _Children(node, live, logits, logits - normaliser)

    def step(self, level: int, children: _Children, chosen: torch.Tensor, standing: torch.Tensor) -> None:
        """Move the front to ``chosen`` ([B, W'], flat indices into the children); read their tokens."""
        parent = chosen // children.node.shape[2]
        self.front = children.node.flatten(1).gather(1, chosen)
        self.standing = standing
        if self.is_last(level):
            return
        batch, width = self.front.shape
        seen = self.ancestry.gather(1, parent[:, :, None].expand(-1, -1, self.ancestry.shape[2]))
        itself = torch.eye(width, dtype=torch.bool, device=self.device).expand(batch, -1, -1)
        self.ancestry = torch.cat([seen, itself], dim=2)
        positions = (self.lengths + level)[:, None].expand(-1, width)
        self.key_positions = torch.cat([self.key_positions, positions], dim=1)
        tokens = self.trie.levels[level].token[self.front]
        everywhere = torch.arange(batch * width, device=self.device)
        self.logits = self._forward(tokens, self.ancestry, positions, everywhere)

    def items(self) -> torch.Tensor:
        """int64 [B, W]: the items of the front after the last level; -1 for beams that are not real."""
        return torch.where(self.standing, self.trie.item_of_leaf[self.front], -1)

    def _forward(
        self, ids: torch.Tensor, allowed: torch.Tensor, positions: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, places of a row, V] at ``places`` of the flattened ``ids``, as many in every row."""
        logits = logits_at(
            self.model,
            places,
            cache=self.cache,
            input_ids=ids,
            attention_mask=attention_argument(self.model, allowed, positions, self.key_positions),
            position_ids=positions,
        )
        return logits.float().view(len(ids), -1, logits.shape[1])


def _condition(gumbel: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
    """Shift independent Gumbels [B, W, m] so that the largest below a parent is the parent's own [B, W].

    ``-log(exp(-G) - exp(-Z) + exp(-g))`` with Z the largest g, computed stably (Kool et al., appendix B).
    """
    largest = gumbel.amax(dim=2, keepdim=True)
    gap = (gumbel - largest).clamp(max=0)
    shifted = parents[:, :, None] - gumbel + torch.log1p(-gap.exp())  # -inf for the largest itself
    moved = parents[:, :, None] - shifted.clamp(min=0) - torch.log1p((-shifted.abs()).exp())
    return torch.where(gap == 0, parents[:, :, None], moved)
