"""Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438)."""

import torch
from torch import Tensor

from nemo_eppo.algorithms.masking import last_action, zero_outside


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap_truncated: bool = False,
    truncated: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`A_t = delta_t + gamma*lam*A_{t+1}` with `delta_t = r_t + gamma*V_{t+1} - V_t`, and the returns `A_t + V_t`.

    `V_t` is the value of the state in which action `t` is taken. The value after the last action is 0: the episode is
    over. With `bootstrap_truncated` a response that was cut off is not over, and the value after its last action is
    `bootstrap_values`. That state has no column in `values`; without `bootstrap_values` the last state that has one,
    in which the last token was chosen, stands in for it.

    Args:
        rewards: [B, T].
        values: [B, T].
        mask: bool [B, T], one unbroken run of response tokens in each row, anywhere.
        gamma: discount.
        lam: lambda of GAE.
        bootstrap_truncated: treat truncated responses as unfinished.
        truncated: bool [B], needed if `bootstrap_truncated`.
        bootstrap_values: [B], read only for truncated rows.

    Returns:
        advantages [B, T] and returns [B, T], both zero outside the mask.

    Raises:
        ValueError: for a row without response, or with a gap in it.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    last = last_action(mask)
    if bool((last - mask.int().argmax(dim=1) + 1 != mask.sum(dim=1)).any()):
        raise ValueError("mask: expected one unbroken run of response tokens in each row")

    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if bootstrap_truncated:
        if truncated is None:
            raise ValueError("truncated: needed when bootstrap_truncated is set")
        after = values.gather(1, last[:, None])[:, 0] if bootstrap_values is None else bootstrap_values.to(values)
        next_values = next_values.scatter(1, last[:, None], torch.where(truncated, after, 0.0)[:, None])

    # A_t is the sum of (gamma*lam)^i * delta_{t+i}. Each pass doubles the number of deltas summed, so log2(T) passes
    # over the batch replace a loop over T. What this leaves before the response is cut off at the end.
    advantages = zero_outside(rewards + gamma * next_values - values, mask)
    reach, decay = 1, gamma * lam
    while reach < advantages.shape[1]:
        summed = advantages[:, :-reach] + decay * advantages[:, reach:]
        advantages = torch.cat([summed, advantages[:, -reach:]], dim=1)
        reach, decay = 2 * reach, decay * decay
    return zero_outside(advantages, mask), zero_outside(advantages + values, mask)
