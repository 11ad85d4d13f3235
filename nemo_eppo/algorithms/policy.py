"""The losses of PPO (Schulman et al. 2017, arXiv 1707.06347) as sums over a micro-batch divided by a global count.

Because the denominator is the number of tokens (or sequences) of the *whole* mini-batch, adding the results of all
micro-batches and all data-parallel ranks gives the loss, and the gradient, of the undivided mini-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import Aggregation
from nemo_eppo.algorithms.masking import masked_log_ratio, masked_mean, masked_sum, zero_outside


class PolicyStats(NamedTuple):
    """Detached scalars, each a sum over response tokens: add them up over micro-batches and ranks, and divide by the
    response tokens of the global mini-batch to get a mean."""

    clipped: Tensor
    """Number of tokens whose loss is the clipped one or bound by `dual_clip`; its mean is the clip fraction."""
    approx_kl: Tensor
    """k3 estimate of KL(old policy || policy), in nats."""
    ratio: Tensor
    """Probability ratio of the policy to the old policy."""


def aggregate(per_token: Tensor, mask: Tensor, aggregation: Aggregation, denominator: float | Tensor) -> Tensor:
    """Return this micro-batch's share of a mean over the global mini-batch: of losses, entropies or KL estimates.

    Args:
        per_token: [B, T].
        mask: bool [B, T]. A row without a True contributes nothing.
        aggregation: `token` and `fixed` sum over tokens; `sequence` sums the means of rows.
        denominator: number of response tokens of the global mini-batch (`token`), of its sequences (`sequence`), or of
            its sequences times the most tokens a response may have (`fixed`). `fixed` gives every token the same
            weight, however long its response or the others are (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783).

    Returns:
        scalar.
    """
    if aggregation in ("token", "fixed"):
        return masked_sum(per_token, mask) / denominator
    if aggregation == "sequence":
        return (masked_sum(per_token, mask, dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / denominator
    raise ValueError(f"aggregation: {aggregation!r}; expected 'token', 'sequence' or 'fixed'")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    aggregation: Aggregation = "token",
    denominator: float | Tensor,
    importance_weights: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate `max(-A*rho, -A*clip(rho, 1-clip_low, 1+clip_high))` with `rho = exp(logprob - old_logprob)`.

    Args:
        logprobs: [B, T] of the policy being trained, with gradient.
        old_logprobs: [B, T] of the policy that sampled.
        advantages: [B, T].
        mask: bool [B, T].
        clip_low: how far below 1 the ratio is clipped.
        clip_high: how far above 1 the ratio is clipped.
        dual_clip: c > 1; where A < 0 the loss is at most `-c*A` (Ye et al. 2020, arXiv 1912.09729); None: no bound.
        aggregation: see `aggregate`.
        denominator: see `aggregate`.
        importance_weights: [B, T] factor per token, see `truncated_importance_weights`; no gradient flows into it.

    Returns:
        scalar loss share, and the sums for metrics.
    """
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: {dual_clip}; expected a number above 1, or None")
    advantages = zero_outside(advantages, mask)
    log_ratio = masked_log_ratio(logprobs, old_logprobs, mask)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        per_token = torch.where(advantages < 0, torch.minimum(per_token, -dual_clip * advantages), per_token)
    is_clipped = per_token != unclipped
    if importance_weights is not None:
        per_token = per_token * zero_outside(importance_weights, mask).detach()
    loss = aggregate(per_token, mask, aggregation, denominator)

    with torch.no_grad():
        stats = PolicyStats(
            clipped=masked_sum(is_clipped.to(loss.dtype), mask),
            approx_kl=masked_sum(log_ratio.expm1() - log_ratio, mask),
            ratio=masked_sum(ratio, mask),
        )
    return loss, stats


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None,
    denominator: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum `0.5 * max((V-R)^2, (clip(V, V_old-clip, V_old+clip)-R)^2)` over tokens, divided by the global token count.

    Args:
        values: [B, T] of the critic being trained, with gradient.
        old_values: [B, T] of the critic before this step's updates.
        returns: [B, T] that the values are trained towards.
        mask: bool [B, T].
        clip: how far a value may move from `old_values`; None: no clipping.
        denominator: response tokens of the global mini-batch.

    Returns:
        scalar loss share, and the number of tokens whose loss is the clipped one, detached.
    """
    values, old_values, returns = (zero_outside(x, mask) for x in (values, old_values, returns))
    unclipped = (values - returns).square()
    clipped = unclipped
    if clip is not None:
        clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask) / denominator
    return loss, masked_sum((clipped > unclipped).to(loss.dtype), mask)


@torch.no_grad()
def truncated_importance_weights(old_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return `min(exp(old_logprob - engine_logprob), cap)` [B, T], which corrects for sampling with an engine.

    Args:
        old_logprobs: [B, T] of the sampled tokens, recomputed by the trainer before this step's updates.
        engine_logprobs: [B, T] of the same tokens, as the generation engine reported them.
        mask: bool [B, T]; the weights are zero outside.
        cap: largest weight, above 0.
    """
    return zero_outside(masked_log_ratio(old_logprobs, engine_logprobs, mask).exp().clamp(max=cap), mask)


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return `1 - Var(R - V) / Var(R)` over the response tokens of [B, T]: at best 1; 0 if returns are constant but for
    their rounding, 1e-6."""
    values, returns = zero_outside(values, mask), zero_outside(returns, mask)

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    total = variance(returns)
    constant = total <= 1e-12 * masked_mean(returns.square(), mask)
    return torch.where(constant, 0.0, 1 - variance(returns - values) / total)
