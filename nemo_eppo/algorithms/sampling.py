"""Sampling that depends only on seed, position and logits: not on batch order, batch size, layout or device."""

import torch
from torch import Tensor

_ROUNDING = 1e-9  # fp64 sums of a vocabulary's probabilities, in different orders, differ by up to 1e-10
_WRAP = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15 - _WRAP
_MIX_1 = 0xBF58476D1CE4E5B9 - _WRAP
_MIX_2 = 0x94D049BB133111EB - _WRAP


def repetition_slopes(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the factors, of the same shape, by which a repetition penalty multiplies `logits` [..., V].

    Where `seen`, bool [..., V], is true, positive logits are divided by the penalty and negative ones multiplied (CTRL,
    arXiv 1909.05858, section 4.1, with the sign that transformers gave it).
    """
    return torch.where(seen, torch.where(logits < 0, logits.new_full((), penalty), 1 / penalty), 1.0)


def keep_mask(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Tell which tokens top-k and then top-p leave: bool [..., V]. Among equal logits the lower token id comes first.

    Args:
        logits: [..., V].
        top_k: keep the k likeliest; 0 keeps all.
        top_p: of these, keep the smallest set, likeliest first, that holds at least this share of their probability;
            always at least one token. 1 keeps all.
    """
    limited = 0 < top_k < logits.shape[-1]
    if not limited and top_p >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    if limited:
        cut, count = _sorted_cut(logits, top_k, top_p)
    else:
        cut, count = _top_p_cut(logits, top_p)
    above, tied = ~(logits <= cut), logits == cut  # a NaN is above, so that it is not dropped but found
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= count - above.sum(dim=-1, keepdim=True)))


def _sorted_cut(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the least logit that `keep_mask` keeps of each row of `logits` [..., V], and how many it keeps, [..., 1].

    Its order of summation defines which set holds a share of `top_p`.
    """
    everything = top_k == logits.shape[-1]
    largest = logits.sort(dim=-1, descending=True).values if everything else logits.topk(top_k).values
    count = torch.full_like(largest[..., :1], top_k, dtype=torch.int64)
    if top_p < 1:
        mass = largest.double().softmax(dim=-1).cumsum(dim=-1)
        count = 1 + (mass[..., :-1] < top_p).sum(dim=-1, keepdim=True)
    return largest.gather(-1, count - 1), count


def _top_p_cut(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Do the same as `_sorted_cut` without top-k, but sort only the likeliest tokens where they are enough.

    The host waits for the device to know whether they are.
    """
    largest = logits.topk(max(1, logits.shape[-1] // 16)).values
    mass = (largest.double() - logits.double().logsumexp(dim=-1, keepdim=True)).exp_().cumsum(dim=-1)
    count = 1 + (mass[..., :-1] < top_p).sum(dim=-1, keepdim=True)
    cut = largest.gather(-1, count - 1)
    # a row is sorted if it needs more tokens, has a NaN, or another order of summation might decide otherwise
    clear = (mass[..., -1] > top_p) & ((mass - top_p).abs() > _ROUNDING).all(dim=-1)
    if not clear.all():
        cut[~clear], count[~clear] = _sorted_cut(logits[~clear], logits.shape[-1], top_p)
    return cut, count


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Replace the `logits` [..., V] of the tokens that `keep_mask` drops by -inf."""
    return torch.where(keep_mask(logits, top_k, top_p), logits, -torch.inf)


def counter_hash(seeds: Tensor, counters: Tensor) -> Tensor:
    """Hash (seed, counter) pairs to 64 bits with splitmix64 (Steele et al. 2014): int64, of the broadcast shape.

    Args:
        seeds: int64; any values, neighbouring ones included, give unrelated streams.
        counters: int64.
    """
    return mix64(mix64(seeds + _GOLDEN) + _GOLDEN * counters)


def mix64(z: Tensor) -> Tensor:
    """Scramble int64 values one to one, elementwise: the output function of splitmix64."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw uniform float64 numbers strictly between 0 and 1, one for each (seed, position); both int64 [B]."""
    return (_shift(counter_hash(seeds, positions), 12).double() + 0.5) * 2.0**-52


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution; never one of probability 0.

    Probabilities become integers in units of 2^-52, whose sums are exact, so every device draws the same token from the
    same probabilities. A token below 2^-52 is never drawn.

    Args:
        logits: fp32 [B, V], temperature and filters applied.
        uniforms: fp64 [B] in [0, 1).

    Returns:
        int64 [B]. NaN or +inf among a row's logits, or nothing but -inf, give some token whose log-prob is NaN: looking
        for them here would make the host wait for the device at every token.
    """
    probabilities = logits.softmax(dim=-1).mul_(2.0**52)
    cumulative = probabilities.long().cumsum_(dim=-1)  # in place: allocating [B, V] anew costs more than adding up
    threshold = (uniforms[:, None] * cumulative[:, -1:]).long()
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logits.size(-1) - 1)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right as if unsigned: int64 `>>` would fill with the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
