"""Response masks, and statistics over the tokens inside a mask that nothing outside it can change."""

import torch
from torch import Tensor

_MAX_LOG_RATIO = 20.0  # e^20 is 5e8, as good as infinite, and nothing overflows


def response_mask(prompt_lengths: Tensor, lengths: Tensor, sequence_length: int) -> Tensor:
    """Return True where action `t` predicts a response token: `prompt_length <= t + 1 < length`.

    Args:
        prompt_lengths: [B] tokens of the prompt, at least 1.
        lengths: [B] tokens of prompt and response together, the policy's own EOS included.
        sequence_length: S, the padded length.

    Returns:
        bool [B, T] with T = S - 1.

    Raises:
        ValueError: not every row has 1 <= prompt_length <= length <= S.
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
    """Return `x` in fp32 (fp64 stays fp64) with zeros outside the mask, whatever stood there, and so its gradient.

    Apply it to the inputs of a formula, not to its result: NaN times a zero gradient is NaN.

    Args:
        x: [B, T].
        mask: bool [B, T].
    """
    if mask.dtype != torch.bool or x.shape != mask.shape:
        raise ValueError(f"mask: expected bool {tuple(x.shape)} as the values, got {mask.dtype} {tuple(mask.shape)}")
    return torch.where(mask, x if x.dtype == torch.float64 else x.float(), 0.0)


def masked_log_ratio(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return `clamp(logprob - ref_logprob, -20, 20)` [B, T], zero outside the mask [B, T]."""
    log_ratio = zero_outside(logprobs, mask) - zero_outside(ref_logprobs, mask)
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum `x` [B, T] over the mask [B, T], along `dim` or, if it is None, to a scalar."""
    return zero_outside(x, mask).sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average `x` [B, T] over the mask [B, T], along `dim` or, if it is None, to a scalar.

    Raises:
        ValueError: there is no token to average over.
    """
    count = mask.sum(dim=dim)
    if bool((count == 0).any()):
        where = "the batch" if dim is None else f"rows {(count == 0).nonzero()[:, 0].unique().tolist()}"
        raise ValueError(f"mask: no token to average in {where}")
    return masked_sum(x, mask, dim) / count


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Scale `x` [B, T] to mean zero and unit variance over all tokens inside the mask.

    The variance is the population's (divided by n), with 1e-8 added: a constant input becomes zeros, not infinities.
    The result is zero outside the mask.
    """
    x = zero_outside(x, mask)
    wide = x.double()  # an fp32 mean is off by rounding, which the division magnifies
    centred = wide - masked_mean(wide, mask)
    scaled = centred * torch.rsqrt(masked_mean(centred.square(), mask) + 1e-8)
    return zero_outside(scaled, mask).to(x.dtype)


def last_action(mask: Tensor) -> Tensor:
    """Return the index [B] of each response's last action in `mask` [B, T], which gets the response's reward.

    Raises:
        ValueError: samples have no response token; the message names them.
    """
    index = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1)
    if bool((index < 0).any()):
        raise ValueError(f"mask: no response token in samples {(index < 0).nonzero().flatten().tolist()}")
    return index


def require_finite(name: str, x: Tensor, mask: Tensor | None = None) -> None:
    """Refuse NaN and infinities in `x` [B, ...]; with a `mask` of the same shape only inside it.

    Raises:
        ValueError: there is one; the message has `name`, the value and its place.
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
