"""Reward disentangled from length (ODIN, Chen et al., ICML 2024, arXiv 2402.07319)."""

import torch
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of x and y, both [N]: a scalar; 0 without gradient if either is constant to 1e-6."""
    x_centred, y_centred = x - x.mean(), y - y.mean()
    if x_centred.norm() <= 1e-6 * x.norm() or y_centred.norm() <= 1e-6 * y.norm():
        return torch.zeros_like(x_centred.sum()).detach()
    return (x_centred * y_centred).sum() / (x_centred.norm() * y_centred.norm())


def length_loss(quality: Tensor, length_scores: Tensor, lengths: Tensor) -> Tensor:
    """Return `|rho(quality, lengths)| - rho(length_scores, lengths)`: the quality head should know nothing of
    length, the length head everything. All are [N]; the scalar is no mean over rows, see `length_slopes`."""
    lengths = lengths.to(quality.dtype)
    return pearson(quality, lengths).abs() - pearson(length_scores, lengths)


def length_slopes(quality: Tensor, length_scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of `length_loss` by `quality` and by `length_scores`, [N] each.

    With them `sum_i(slope_q_i * q_i + slope_l_i * l_i)` is a sum over rows with the gradient of `length_loss` over the
    *global* batch, so micro-batches and ranks cannot change it.

    Args:
        quality: [N] scores of the quality head for the global batch, under the weights that are about to be updated.
        length_scores: [N] scores of the length head.
        lengths: [N] response tokens.
    """
    with torch.enable_grad():
        q, length_head = (x.detach().double().requires_grad_() for x in (quality, length_scores))
        # the zeros give a gradient to scores that are all equal, which have none
        loss = length_loss(q, length_head, lengths) + 0 * (q.sum() + length_head.sum())
        slopes = torch.autograd.grad(loss, (q, length_head))
    return slopes[0].to(quality.dtype), slopes[1].to(quality.dtype)
