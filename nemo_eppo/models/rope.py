"""Rotary positions: the kinds of `rope_scaling`, and the frequencies at which channels turn."""

import math

import torch
from torch import Tensor

from nemo_eppo.settings.model import RopeScaling


def inverse_frequencies(width: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Return the angle [width / 2], fp32, in radians, by which each pair of channels turns from token to token.

    Frequencies that are not stretched have transformers' rounding: at position 100,000 a last bit is 0.01 radians.

    Args:
        width: channels of a head.
        base: base of the geometric series of frequencies.
    """
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if scaling is None or scaling.rope_type == "dynamic":
        return plain
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched
    original = scaling.original_max_position_embeddings
    assert original is not None
    if scaling.rope_type == "llama3":
        assert scaling.low_freq_factor is not None
        assert scaling.high_freq_factor is not None
        turns = plain * (original / (2 * math.pi))
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:  # YaRN, arXiv 2309.00071, section 3.2, as a ramp over channels

        def pair(turns: float) -> float:
            """The pair of channels, not a whole number, that turns this often in the original length."""
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(scaling.beta_fast or 32), pair(scaling.beta_slow or 1)
        if scaling.truncate is not False:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        kept = 1 - (torch.arange(width // 2) - first) / (last - first or 0.001)
    kept = kept.clamp(0, 1)
    return stretched * (1 - kept) + plain * kept
