"""Estimates of how far a policy is from its reference, per token (Schulman, Approximating KL divergence, 2020) and per
response."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import DivergenceKind, KLEstimator
from nemo_eppo.algorithms.masking import masked_log_ratio


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kind: KLEstimator) -> Tensor:
    """Estimate the KL per token from `L = clamp(logprob - ref_logprob, -20, 20)`.

    The estimators are k1 `L`, k2 `L^2 / 2` and k3 `exp(-L) - 1 + L`.
    k1 and k3 estimate KL(policy || reference) without bias for tokens sampled from the policy; k2 and k3 are never
    negative. As a loss, differentiated at the policy that sampled, k2 gives the gradient of KL(policy || reference),
    k3 the gradient of KL(reference || policy), and k1 zero in expectation.

    Args:
        logprobs: [B, T] of the policy, in nats.
        ref_logprobs: [B, T] of the reference.
        mask: bool [B, T].
        kind: which estimator.

    Returns:
        [B, T] in nats, zero outside the mask.
    """
    log_ratio = masked_log_ratio(logprobs, ref_logprobs, mask)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return (-log_ratio).expm1() + log_ratio
    raise ValueError(f"kind: {kind!r}; expected 'k1', 'k2' or 'k3'")


TAIL = 10.0
"""Beyond a log-ratio of +-10 the exponentials continue as straight lines of the same slope: gradients stay finite."""

SQRT_FLOOR = 1e-4
"""Below this chi2, the slope of sqrt(chi2) is taken as 0; it would be infinite where policy and reference are equal."""


class SequenceDivergence(NamedTuple):
    """Estimates of the divergence, [B] each: one from every response."""

    log_ratio: Tensor
    """`L = sum_t (logprob - ref_logprob)`, whose mean under the policy is KL(policy || reference)."""
    ratio: Tensor
    """`rho = exp(L) - 1`, whose mean under the policy is chi2(policy || reference)."""
    kl: Tensor
    """`L + iota` with `iota = exp(-L) - 1`, never negative; its mean is KL(policy || reference)."""
    chi2: Tensor
    """`rho + iota`, never negative; its mean is chi2(policy || reference): iota has mean 0 under the policy."""


def sequence_divergence(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> SequenceDivergence:
    """Estimate how far the policy is from the reference over whole responses (Laidlaw et al., arXiv 2403.03185).

    Args:
        logprobs: [B, T] of the policy, with or without gradient. A token's log-ratio is clamped to +-20.
        ref_logprobs: [B, T].
        mask: bool [B, T].
    """
    total = masked_log_ratio(logprobs, ref_logprobs, mask).sum(dim=1)
    ratio, inverse = _expm1_with_tail(total), _expm1_with_tail(-total)
    return SequenceDivergence(total, ratio, total + inverse, ratio + inverse)


def divergence_slope(chi2: float, kind: DivergenceKind) -> float:
    """Return the factor for every response's `kl` or `chi2` that gives their batch mean the gradient of the penalty.

    It is 1 except for `sqrt_chi2`: `d sqrt(max(X, 1e-4)) / dX` at `X = chi2`. With `X` of the *global* batch the
    gradient is a sum over responses, which does not depend on micro-batches and ranks.

    Args:
        chi2: mean of `SequenceDivergence.chi2` over the global batch.
        kind: the penalised divergence.
    """
    if kind != "sqrt_chi2":
        return 1.0
    return 0.5 / math.sqrt(chi2) if chi2 > SQRT_FLOOR else 0.0


def _expm1_with_tail(x: Tensor) -> Tensor:
    # the clamp keeps the branch that is not taken finite, and with it the gradient
    return torch.where(x < TAIL, x.clamp(max=TAIL).expm1(), math.exp(TAIL) * (1 + x - TAIL) - 1)
