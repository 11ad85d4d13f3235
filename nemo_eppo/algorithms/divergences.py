"""Per-token estimates of KL(policy || reference) from sampled tokens (Schulman, Approximating KL divergence, 2020)."""

from typing import Literal

from torch import Tensor

from nemo_eppo.algorithms.masking import zero_outside
from nemo_eppo.algorithms.policy import MAX_LOG_RATIO

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kind: KLEstimator) -> Tensor:
    """With `L = clamp(logprob - ref_logprob, -20, 20)`: k1 `L`; k2 `L^2 / 2`; k3 `exp(-L) - 1 + L`.

    k1 and k3 estimate KL(policy || reference) without bias for tokens sampled from the policy; k2 and k3 are never
    negative. As a loss, differentiated at the policy that sampled, k2 gives the gradient of KL(policy || reference),
    k3 that of KL(reference || policy), and k1 zero in expectation.

    Args:
        logprobs: [B, T].
        ref_logprobs: [B, T].
        mask: bool [B, T].
        kind: the estimator.

    Returns:
        [B, T], zero outside the mask.
    """
    log_ratio = zero_outside(logprobs, mask) - zero_outside(ref_logprobs, mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        return (-log_ratio).expm1() + log_ratio
    raise ValueError(f"kind: {kind!r}; expected 'k1', 'k2' or 'k3'")
