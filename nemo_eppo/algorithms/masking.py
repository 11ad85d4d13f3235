"""Which tokens count: response masks, and statistics that nothing outside the mask can touch."""

import torch
from torch import Tensor


def response_mask(prompt_lengths: Tensor, lengths: Tensor, sequence_length: int) -> Tensor:
    """True where action `t` predicts a response token: `prompt_length <= t + 1 < length`.

    Args:
        prompt_lengths: [B] tokens of the prompt, at least 1.
        lengths: [B] tokens of prompt and response together, the policy's own EOS included.
        sequence_length: S, the padded length.

    Returns:
        bool [B, T] with T = S - 1.

    Raises:
        ValueError: unless 1 <= prompt_length <= length <= S in every row.
    """
    wrong = (prompt_lengths < 1) | (prompt_lengths > lengths) | (lengths > sequence_length)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"lengths: sample {row} has prompt_length {int(prompt_lengths[row])} and length {int(lengths[row])}; "
            f"expected 1 <= prompt_length <= length <= {sequence_length}"
        )
    predicted = torch.arange(1, sequence_length, device=lengths.device)
    return (predicted >= prompt_lengths[:, None]) & (predicted < lengths[:, None])


def zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 (fp64 stays fp64) with zeros outside the mask, whatever stood there; the same holds for its gradient.

    Apply it to the inputs of a formula, not to its result: NaN times a zero gradient is NaN.

    Args:
        x: [B, T].
        mask: bool [B, T].
    """
    if mask.dtype != torch.bool or x.shape != mask.shape:
        raise ValueError(f"mask: expected bool {tuple(x.shape)} as the values, got {mask.dtype} {tuple(mask.shape)}")
    return torch.where(mask, x if x.dtype == torch.float64 else x.float(), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` [B, T] over the mask [B, T]: a scalar, or along `dim`."""
    return zero_outside(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` [B, T] over the mask [B, T]: a scalar, or along `dim`.

    Raises:
        ValueError: for a mean over nothing.
    """
    count = mask.sum(dim=dim)
    if bool((count == 0).any()):
        where = "the batch" if dim is None else f"rows {(count == 0).nonzero()[:, 0].unique().tolist()}"
        raise ValueError(f"mask: no token to average in {where}")
    return masked_sum(x, mask, dim) / count


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Scale `x` [B, T] to unit variance and mean zero over all masked-in tokens of the batch.

    The variance is the population's (divided by n), with 1e-8 added: a constant input becomes zeros, not infinities.
    Zero outside the mask.
    """
    x = zero_outside(x, mask)
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean).square(), mask) + 1e-8)
    return zero_outside(scaled, mask)


def last_action(mask: Tensor) -> Tensor:
    """Index [B] of the last action of each response in `mask` [B, T]: where a reward for the whole response is paid.

    Raises:
        ValueError: naming the samples without a response token.
    """
    index = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1)
    if bool((index < 0).any()):
        raise ValueError(f"mask: no response token in samples {(index < 0).nonzero().flatten().tolist()}")
    return index


def require_finite(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Stop at the first NaN or infinity in `x` [B, ...] (only inside `mask` of the same shape, if given).

    Raises:
        ValueError: naming the quantity and the place.
    """
    bad = ~torch.isfinite(x)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: {x[tuple(place)].item()} in sample {place[0]}"
            + (f" at position {place[1]}" if len(place) > 1 else "")
            + "; expected finite numbers"
        )
