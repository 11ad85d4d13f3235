"""Distances of latents from those of the SFT model's responses (indicators of InfoRM, NeurIPS 2024, arXiv 2402.09345).

Everything is computed in fp64: with less, the covariance of nearly dependent latents is not positive definite.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.masking import require_finite


class Gaussian(NamedTuple):
    """A normal distribution over latents of width d, with its covariance factorised."""

    mean: Tensor
    """fp64 [d], the mean."""
    factor: Tensor
    """fp64 [d, d], lower triangular: the covariance is `factor @ factor.T`."""


def fit_gaussian(latents: Tensor) -> Gaussian:
    """Fit a Gaussian with the covariance `(1 - s) S + s tr(S)/d I` to latents.

    S is the sample covariance (divided by N). Shrinking keeps it invertible even for N < d; s is that of least expected
    squared error (Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional covariance matrices).

    Args:
        latents: [N, d], N at least 2.

    Raises:
        ValueError: there are fewer than 2 latents, a number is not finite, or the covariance is singular even after
            shrinking.
    """
    if latents.dim() != 2 or latents.shape[0] < 2 or latents.shape[1] < 1:
        raise ValueError(f"latents: shape {tuple(latents.shape)}; expected [N, d] with N at least 2")
    require_finite("latents", latents)
    x = latents.double()
    mean = x.mean(dim=0)
    x = x - mean
    count, width = x.shape
    covariance = x.T @ x / count
    identity = torch.eye(width, dtype=x.dtype, device=x.device)
    target = covariance.trace() / width * identity
    distance = (covariance - target).square().sum()
    # error of S itself: mean over samples of ||x x^T - S||^2, over N; expanded, as x x^T is [d, d] per sample
    error = (x.square().sum(dim=1).square().mean() - covariance.square().sum()) / count
    shrinkage = 1.0 if error >= distance else float(error / distance)
    factor, failed = torch.linalg.cholesky_ex((1 - shrinkage) * covariance + shrinkage * target)
    pivots = factor.diagonal().square()  # rounding may leave a tiny positive pivot where there should be none
    if failed or pivots.min() <= 1e-14 * pivots.max():
        raise ValueError(f"latents: the covariance of these {count} latents of width {width} is singular")
    return Gaussian(mean, factor)


def mahalanobis(latents: Tensor, gaussian: Gaussian) -> Tensor:
    """Mahalanobis distance `D = sqrt((z - mean)^T covariance^-1 (z - mean))` of each latent.

    Args:
        latents: [B, d].
        gaussian: fitted to the SFT model's latents.

    Returns:
        fp64 [B], never negative.

    Raises:
        ValueError: the latents have another width than the Gaussian.
    """
    if latents.dim() != 2 or latents.shape[1] != len(gaussian.mean):
        raise ValueError(f"latents: shape {tuple(latents.shape)}; expected [B, {len(gaussian.mean)}]")
    centred = latents.double() - gaussian.mean
    return torch.linalg.solve_triangular(gaussian.factor, centred.T, upper=False).norm(dim=0)


def p_values(latents: Tensor, gaussian: Gaussian) -> Tensor:
    """Return how likely a latent of the Gaussian is as far away as each of these latents [B, d]: fp64 [B].

    Squared distances of Gaussian latents follow a chi-squared distribution with d degrees of freedom, whose upper tail
    is the regularised incomplete gamma function Q(d/2, D^2/2).
    """
    halves = mahalanobis(latents, gaussian).square() / 2
    return torch.special.gammaincc(torch.full_like(halves, len(gaussian.mean) / 2), halves)


def outlier_fraction(latents: Tensor, gaussian: Gaussian, alpha: float) -> float:
    """Return MOP, the fraction of latents [B, d] whose p-value under the Gaussian is below `alpha`."""
    return float((p_values(latents, gaussian) < alpha).double().mean())
