"""Reward models from preferences: the score of a response, the Bradley-Terry loss, how well scores rank pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_eppo.algorithms.choices import ScoreReduction
from nemo_eppo.algorithms.masking import last_action, masked_mean, masked_sum, response_mask
from nemo_eppo.algorithms.odin import pearson

CALIBRATION_BINS = 10


def sequence_score(token_scores: Tensor, prompt_lengths: Tensor, lengths: Tensor, how: ScoreReduction) -> Tensor:
    """Reduce the scores at tokens to one score per response.

    Args:
        token_scores: [B, S] the score head's output at every token position.
        prompt_lengths: [B] tokens of the prompt.
        lengths: [B] tokens of prompt and response together.
        how: take the score at the last response token, or the sum or mean over all response tokens.

    Returns:
        [B]; the gradient flows only into the scores that were read.

    Raises:
        ValueError: a sample has no response.
    """
    scores = token_scores[:, 1:]  # column t now belongs to token t + 1, like the mask
    mask = response_mask(prompt_lengths, lengths, token_scores.shape[1])
    last = last_action(mask)
    if how == "last":
        return scores.gather(1, last[:, None])[:, 0]
    if how == "sum":
        return masked_sum(scores, mask, dim=1)
    if how == "mean":
        return masked_mean(scores, mask, dim=1)
    raise ValueError(f"how: {how!r}; expected 'last', 'sum' or 'mean'")


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    l2: float = 0.0,
    denominator: float | Tensor,
) -> Tensor:
    """Sum `-log sigmoid(r_w - r_l - margin) + l2 * (r_w^2 + r_l^2) / 2` over pairs, divided by the global pair count.

    Args:
        chosen: [B] scores r_w of the preferred responses.
        rejected: [B] scores r_l of the others.
        margin: by how much r_w should lead: one number, or one for each pair [B].
        label_smoothing: probability that a label is wrong; this share of the loss takes the opposite sign.
        l2: weight of the term that keeps scores near zero.
        denominator: number of pairs in the global mini-batch.

    Returns:
        scalar.
    """
    lead = chosen - rejected - margin
    loss = -(1 - label_smoothing) * F.logsigmoid(lead) - label_smoothing * F.logsigmoid(-lead)
    return (loss + l2 * (chosen.square() + rejected.square()) / 2).sum() / denominator


@torch.no_grad()
def preference_metrics(
    chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> dict[str, float]:
    """Measure how well scores rank N pairs, and their distribution. All statistics are the population's.

    Args:
        chosen: [N] scores of the preferred responses.
        rejected: [N] scores of the others.
        chosen_lengths: [N] tokens of the preferred responses.
        rejected_lengths: [N] tokens of the others.

    Returns:
        `accuracy` (a tie counts half); `margin`, the mean of the lead, chosen less rejected; `mean` and `std` of all
        scores, and with `chosen_` and `rejected_` of each side; `length_correlation`, Pearson's, of score and length
        over all responses (0 if either is constant); `ece`, the expected calibration error of `sigmoid(lead)` over ten
        equal bins of the winner's probability in [0.5, 1].
    """
    chosen, rejected = chosen.double(), rejected.double()
    scores = torch.cat([chosen, rejected])
    lengths = torch.cat([chosen_lengths, rejected_lengths]).double()
    lead = chosen - rejected
    correct = (1 + lead.sign()) / 2

    confidence = lead.abs().sigmoid()
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gap = torch.zeros(CALIBRATION_BINS, dtype=torch.float64, device=lead.device).index_add(
        0, bins, correct - confidence
    )

    return {
        "accuracy": correct.mean().item(),
        "margin": lead.mean().item(),
        "mean": scores.mean().item(),
        "std": scores.std(correction=0).item(),
        "chosen_mean": chosen.mean().item(),
        "chosen_std": chosen.std(correction=0).item(),
        "rejected_mean": rejected.mean().item(),
        "rejected_std": rejected.std(correction=0).item(),
        "length_correlation": pearson(scores, lengths).item(),
        "ece": (gap.abs().sum() / len(lead)).item(),
    }
