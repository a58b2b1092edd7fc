"""With what probability a policy would have sampled a slate that another one served.

The search of ``policies.decoding`` walks down the trie once more, but instead of drawing it is led: the front
is the ancestors of the slate's items. The log-mass of everything that is left by the way is summed, so the
denominators of the Plackett-Luce law are exact here too, and for the policy that served the slate the numbers
are the logged ones.
"""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from .decoding import NOBODY, Left, Search
from .lists import Eligible, UserContext
from .policy import Policy

Floats = npt.NDArray[np.float64]


def slate_propensities(
    policy: Policy,
    users: Sequence[UserContext],
    slates: Sequence[Sequence[str]],
    *,
    eligible: Collection[str] | Eligible | None = None,
    temperature: float = 1.0,
) -> Floats:
    """P(item at t | items before it) under ``Policy.sample``; float64 [users, longest slate].

    ``users``: what was known when the slate was asked for; ``seen`` without the slate's own items. 0 for an
    item that the policy cannot give this user (unknown, seen, not eligible) and for all that follow it; NaN
    behind the end of a slate, and for a user of whose history the policy knows nothing (it would not be
    asked).
    """
    longest = max((len(slate) for slate in slates), default=0)
    found = np.full((len(users), longest), np.nan)
    rows = policy.codec.items
    leaf_of = policy.trie.leaf_of_item
    for places, prompts, left in policy.batches(users, policy.allowed(eligible), True):
        leaves = np.full((len(places), longest), -1, dtype=np.int64)
        for row, place in enumerate(places):
            known = [leaf_of[rows[item]] if item in rows else -1 for item in slates[place]]
            leaves[row, : len(known)] = known
        values = _led(policy, prompts, left, torch.from_numpy(leaves).to(policy.device), temperature)
        for row, place in enumerate(places):
            size = len(slates[place])
            found[place, :size] = values[row, :size]
    return found


@torch.inference_mode()
def _led(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    left: Left,
    leaves: torch.Tensor,
    temperature: float,
) -> Floats:
    """``leaves``: int64 [B, k], -1: an item of which the policy knows nothing, or none at all."""
    search = Search(policy.model, policy.device_trie, prompts, policy.tokens.pad)
    batch, device = len(prompts), search.device
    log_q = torch.zeros(batch, 1, device=device, dtype=torch.float64)
    discarded = torch.full((batch, 1), NOBODY, device=device, dtype=torch.float64)
    for level, nodes in enumerate(search.trie.levels):
        children = search.children(level, left)
        local = (children.logits.double() / temperature).masked_fill(~children.live, NOBODY)
        child_q = log_q[:, :, None] + local - local.logsumexp(dim=2, keepdim=True)
        child_q = child_q.masked_fill(~children.live, NOBODY).flatten(1)
        first = nodes.first_leaf[children.node].flatten(1)[:, :, None]
        last = nodes.first_leaf[children.node + 1].flatten(1)[:, :, None]
        inside = (first <= leaves[:, None, :]) & (leaves[:, None, :] < last)
        wanted = inside.any(dim=2) & children.live.flatten(1)
        keep = max(1, int(wanted.sum(dim=1).max()))
        chosen = wanted.int().sort(dim=1, descending=True, stable=True).indices[:, :keep]
        standing = wanted.gather(1, chosen)
        rest = child_q.masked_fill(wanted, NOBODY)
        discarded = torch.cat([rest, discarded], dim=1).logsumexp(dim=1, keepdim=True)
        log_q = child_q.gather(1, chosen).masked_fill(~standing, NOBODY)
        search.step(level, children, chosen, standing)
    reached = search.front.masked_fill(~search.standing, -2)
    hit = (reached[:, None, :] == leaves[:, :, None]) & (leaves >= 0)[:, :, None]  # [B, k, W]
    shown = log_q[:, None, :].expand(hit.shape).masked_fill(~hit, NOBODY).amax(dim=2)  # [B, k]
    remaining = torch.cat([shown, discarded], dim=1).flip(1).logcumsumexp(dim=1).flip(1)[:, :-1]
    possible = (shown > NOBODY).int().cummin(dim=1).values.bool()
    found = torch.where(possible, (shown - remaining).exp(), torch.zeros_like(shown))
    return np.asarray(found.cpu().numpy())
