"""Preference losses: one chosen response against the rejected ones of the same prompt.

With ``h(y) = log pi(y|x) - log ref(y|x)`` and margins ``m_l = h(y_w) - h(y_l)`` a sample's loss is

    softmax   -log sigmoid(u),  u = -log sum_l exp(-beta m_l)
    dpo       mean over l of  -log sigmoid(beta m_l)
    ipo       mean over l of  (m_l / L - 1 / (2 beta))^2,  L the tokens of an answer

``softmax`` is Softmax-DPO (Align3GR, arXiv 2511.11255, section 3.3; S-DPO, arXiv 2406.09215, equation 10):
all rejected at once. ``dpo`` (arXiv 2305.18290) and ``ipo`` (arXiv 2310.12036, equation 17, per token as in
TRL) know pairs only: with several rejected they are the mean over a sample's pairs, so that a sample counts
once however many it rejects. With one rejected response ``softmax`` and ``dpo`` are the same.

Label smoothing says that a share eps of the preferences is wrong. With ``clean = -log sigmoid(u)`` and
``flipped = -log sigmoid(-u)`` (for ``softmax``: some rejected response, whichever, is the better one):

    conservative   (1 - eps) clean + eps flipped                        (cDPO, Mitchell's note on DPO)
    robust         ((1 - eps) clean - eps flipped) / (1 - 2 eps)        (rDPO, arXiv 2403.00409: unbiased)

Fewer rejected responses than columns are masked, never repeated: twenty copies of one response would add a
silent margin of ln 20.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.settings import StageSettings


@dataclass(frozen=True)
class Responses:
    """Log-probabilities of B prompts' responses; ``mask`` says which of the R columns count.

    ``chosen`` [B] float, ``rejected`` [B, R] float, ``mask`` [B, R] bool (True: a real response).
    """

    chosen: Tensor
    rejected: Tensor
    mask: Tensor
    fork: Tensor
    """[B, R] float: log pi of the chosen's code minus that of the rejected's at the first code where the two
    differ, each given the codes before it (which they share)."""

    def rows(self, numbers: list[int]) -> "Responses":
        """These prompts, with no more columns than the longest of them needs."""
        mask = self.mask[numbers]
        width = int(mask.sum(dim=1).max())
        return Responses(
            self.chosen[numbers], self.rejected[numbers, :width], mask[:, :width], self.fork[numbers, :width]
        )


def preference_loss(policy: Responses, reference: Responses, stage: StageSettings, length: int) -> Tensor:
    """The loss that ``stage`` names of each sample, with its smoothing and anchor, [B] float.

    ``length``: tokens of an answer (all answers of a codec have as many). What is in a masked column has no
    influence on loss or gradient, not even a NaN. Raises ValueError for a sample without a rejected response.
    """
    mask = policy.mask
    if not bool(mask.any(dim=1).all()):
        raise ValueError(
            "a preference sample without a rejected response has no loss; leave it out of the batch"
        )
    margin = (policy.chosen - reference.chosen).unsqueeze(1) - (
        policy.rejected.masked_fill(~mask, 0.0) - reference.rejected.masked_fill(~mask, 0.0)
    )
    if stage.loss == "softmax":
        advantage = (-stage.beta * margin).masked_fill(~mask, -torch.inf)
        loss = _smoothed(-torch.logsumexp(advantage, dim=1), stage)
    elif stage.loss == "dpo":
        loss = mean_of(_smoothed(stage.beta * margin, stage), mask)
    else:
        loss = mean_of((margin / length - 1 / (2 * stage.beta)) ** 2, mask)
    return loss + stage.anchor * nll_anchor(policy.chosen, length) if stage.anchor else loss


def nll_anchor(chosen: Tensor, length: int) -> Tensor:
    """Negative log-likelihood per token of each chosen response, [B] float.

    Added with a small weight it keeps the chosen response from losing probability together with rejected ones
    that share its first codes (likelihood displacement); TRL's loss type ``sft`` is the same term.
    """
    return -chosen / length


def mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sample's own rejected responses: [B, R] -> [B]."""
    return values.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)


def _smoothed(advantage: Tensor, stage: StageSettings) -> Tensor:
    """-log sigmoid of the chosen's advantage, with the stage's label smoothing; any shape."""
    clean, share = -F.logsigmoid(advantage), stage.label_smoothing
    if not share:
        return clean
    flipped = -F.logsigmoid(-advantage)
    if stage.smoothing == "robust":
        return ((1 - share) * clean - share * flipped) / (1 - 2 * share)
    return (1 - share) * clean + share * flipped


def preference_metrics(policy: Responses, reference: Responses, beta: float) -> dict[str, float]:
    """Mean rewards and log-probabilities over a batch, under TRL's names, and two more.

    A sample's rejected responses are averaged first, then samples: with one rejected response every figure
    that TRL has equals TRL's. ``rewards/accuracies`` is the share of its rejected responses that the chosen
    one outscores.

    ``rewards/margins_divergent``: the part of ``rewards/margins`` that is won at the first code where chosen
    and rejected part. The codes before it are the same and cancel; those behind it stand under different
    prefixes and can gain without the two ever being told apart. There a beam search decides between them.

    ``kl``: KL(pi || ref) of the two distributions restricted to the sample's scored answers, i.e. with p and
    q the log-probabilities of chosen and rejected renormalised to sum to 1, ``sum_y p(y) log(p(y) / q(y))``,
    in nats. It says how far the policy moved among these answers; mass that left all of them alike does not
    show here but in ``logps/chosen``.
    """
    mask = policy.mask
    with torch.no_grad():
        chosen_reward = beta * (policy.chosen - reference.chosen)
        rejected_reward = beta * (policy.rejected - reference.rejected)
        rejected_mean = mean_of(rejected_reward, mask)
        outscored = (chosen_reward.unsqueeze(1) > rejected_reward).to(policy.chosen.dtype)
        figures = torch.stack(
            [
                chosen_reward.mean(),
                rejected_mean.mean(),
                (chosen_reward - rejected_mean).mean(),
                mean_of(outscored, mask).mean(),
                policy.chosen.mean(),
                mean_of(policy.rejected, mask).mean(),
                beta * mean_of(policy.fork - reference.fork, mask).mean(),
                _kl_among_scored(policy, reference).mean(),
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
    "rewards/margins_divergent",
    "kl",
)


def _kl_among_scored(policy: Responses, reference: Responses) -> Tensor:
    """[B]; see ``preference_metrics``."""
    p, q = (
        torch.cat(
            [one.chosen.unsqueeze(1), one.rejected.masked_fill(~policy.mask, -torch.inf)], dim=1
        ).log_softmax(dim=1)
        for one in (policy, reference)
    )
    there = torch.cat([torch.ones_like(policy.mask[:, :1]), policy.mask], dim=1)
    return (p.exp() * (p - q)).masked_fill(~there, 0.0).sum(dim=1)
