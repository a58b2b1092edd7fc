"""Softmax-DPO: one chosen response against every rejected one of the same prompt, at once.

With rewards r(y) = beta * log(pi(y|x) / ref(y|x)) a sample's loss is

    -log sigmoid( -log sum_{y_l in Y_l} exp( r(y_l) - r(y_w) ) )

(Align3GR, arXiv 2511.11255, section 3.3; S-DPO, arXiv 2406.09215, equation 10). Fewer rejected responses than
columns are masked, never repeated: twenty copies of one response would add a silent margin of ln 20. With one
rejected response this is DPO.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of B prompts' responses; ``mask`` says which of the R columns count.

    ``chosen`` [B] float, ``rejected`` [B, R] float, ``mask`` [B, R] bool (True: a real response).
    """

    chosen: Tensor
    rejected: Tensor
    mask: Tensor


def softmax_dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """The Softmax-DPO loss of each sample, [B] float: -log sigmoid(-logsumexp_l(r(y_l) - r(y_w))).

    ``chosen``, ``ref_chosen`` [B]; ``rejected``, ``ref_rejected`` [B, R]; ``mask`` [B, R] bool. What is in
    a masked column has no influence on loss or gradient, not even a NaN. Raises ValueError for a row without
    a rejected response: it has no loss.
    """
    if not bool(mask.any(dim=1).all()):
        raise ValueError(
            "a preference sample without a rejected response has no loss; leave it out of the batch"
        )
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected.masked_fill(~mask, 0.0) - ref_rejected.masked_fill(~mask, 0.0))
    advantage = (rejected_reward - chosen_reward.unsqueeze(1)).masked_fill(~mask, -torch.inf)
    return -F.logsigmoid(-torch.logsumexp(advantage, dim=1))


def nll_anchor(chosen: Tensor, length: int) -> Tensor:
    """Negative log-likelihood per token of each chosen response, [B] float.

    Added with a small weight it keeps the chosen response from losing probability together with rejected ones
    that share its first codes (likelihood displacement); TRL's ``rpo_alpha`` is the same term.
    """
    return -chosen / length


def preference_metrics(policy: Responses, reference: Responses, beta: float) -> dict[str, float]:
    """Mean rewards and log-probabilities over a batch, under TRL's names.

    A sample's rejected responses are averaged first, then samples: with one rejected response every figure
    equals TRL's. ``rewards/accuracies`` is the share of its rejected responses that the chosen one outscores.
    """
    mask = policy.mask
    weight = mask.to(policy.chosen.dtype)
    counts = weight.sum(dim=1)

    def per_sample(values: Tensor) -> Tensor:
        return (values.masked_fill(~mask, 0.0) * weight).sum(dim=1) / counts

    with torch.no_grad():
        chosen_reward = beta * (policy.chosen - reference.chosen)
        rejected_reward = beta * (policy.rejected - reference.rejected)
        rejected_mean = per_sample(rejected_reward)
        figures = torch.stack(
            [
                chosen_reward.mean(),
                rejected_mean.mean(),
                (chosen_reward - rejected_mean).mean(),
                per_sample((chosen_reward.unsqueeze(1) > rejected_reward).to(weight.dtype)).mean(),
                policy.chosen.mean(),
                per_sample(policy.rejected).mean(),
            ]
        )
    return dict(zip(METRIC_NAMES, figures.tolist(), strict=True))


METRIC_NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
