"""Energy loss of a response and the distance EPPO penalises (Miao et al., ICML 2025, arXiv 2501.19358).

A token's energy loss is the L1 norm of a module's input minus that of its output. The energy probe in megatron/
measures it; here it is averaged over the response and compared between the policy (RLHF) and the reference (SFT).
"""

import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import EnergyWindow, Sided
from nemo_eppo.algorithms.masking import masked_mean


def energy_window(energies: Tensor, window: EnergyWindow) -> Tensor:
    """Align energies at token positions with actions.

    Args:
        energies: [B, S, E] energy loss at every token position, for E modules.
        window: with `response`, action `t` gets the energy at position `t + 1`; otherwise the one at position `t`.

    Returns:
        [B, T, E] with T = S - 1, to be averaged over the response.
    """
    if window == "response":
        return energies[:, 1:]
    if window == "generating":
        return energies[:, :-1]
    raise ValueError(f"window: {window!r}; expected 'response' or 'generating'")


def response_energy(energy: Tensor, mask: Tensor, max_tokens: int | None = None) -> Tensor:
    """Mean energy loss of each response.

    Args:
        energy: [B, T, E] energy loss per action, as `energy_window` returns it.
        mask: bool [B, T], True where action `t` produced a response token.
        max_tokens: average only over the first tokens, up to this number (authors: 1024); None for all.

    Returns:
        [B, E].

    Raises:
        ValueError: a response has no token.
    """
    if max_tokens is not None:
        mask = mask & (mask.cumsum(dim=1) <= max_tokens)
    return masked_mean(energy, mask[:, :, None].expand_as(energy), dim=1)


def energy_difference(policy: Tensor, reference: Tensor, sided: Sided) -> Tensor:
    """`D = |dE_SFT - dE_RLHF|` of each sample, summed over modules; the penalised reward is `r - eta * D`.

    Args:
        policy: [B, E] mean energy loss of the policy on its response.
        reference: [B, E] mean energy loss of the reference.
        sided: `both` takes the paper's absolute difference; `rise` counts only how much higher the policy's is.

    Returns:
        [B], never negative.
    """
    rise = policy - reference
    if sided == "both":
        return rise.abs().sum(dim=1)
    if sided == "rise":
        return rise.clamp(min=0).sum(dim=1)
    raise ValueError(f"sided: {sided!r}; expected 'both' or 'rise'")


def apply_floor(reward: Tensor, penalised: Tensor, floor_ratio: float) -> Tensor:
    """Return `max(penalised, r - c*|r|)` [B]: the penalty takes at most the fraction `c` of a reward's absolute value.

    Unlike `max(penalised, c*r)` this never raises a negative reward above what it was.

    Args:
        reward: [B] before the penalty.
        penalised: [B] after it.
        floor_ratio: c >= 0.
    """
    return torch.maximum(penalised, reward - floor_ratio * reward.abs())
