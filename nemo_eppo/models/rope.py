"""Rotary positions: the kinds of `rope_scaling`, and the frequencies at which channels turn."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.config import Config

RopeType = Literal["linear", "dynamic", "yarn", "llama3"]
_SETTINGS: dict[RopeType, tuple[set[str], set[str]]] = {
    "linear": (set(), set()),
    "dynamic": (set(), {"original_max_position_embeddings"}),
    "yarn": (
        {"original_max_position_embeddings"},
        {"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"},
    ),
    "llama3": ({"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}, set()),
}
"""Settings beside `factor` that each kind needs, and those that it may have."""


class RopeScaling(Config):
    """How rotary positions are stretched over longer sequences than a model first learnt; config.json's own keys."""

    rope_type: RopeType
    """linear divides all frequencies by factor; llama3 and yarn only the low ones, which turn less than about once in
    original_max_position_embeddings tokens. dynamic changes none up to the model's longest sequence."""
    factor: float = Field(gt=0)
    """How many times longer sequences may be."""
    original_max_position_embeddings: int | None = Field(None, ge=1)
    """Longest sequence, in tokens, before it was stretched (llama3, yarn)."""
    low_freq_factor: float | None = Field(None, gt=0)
    """Channels that turn fewer times in the original length are stretched by factor (llama3)."""
    high_freq_factor: float | None = Field(None, gt=0)
    """Channels that turn more often in the original length stay as they are (llama3)."""
    beta_fast: float | None = Field(None, gt=0)
    """The same as high_freq_factor, for yarn; null for 32."""
    beta_slow: float | None = Field(None, gt=0)
    """The same as low_freq_factor, for yarn; null for 1."""
    truncate: bool | None = None
    """Round the channels that beta_fast and beta_slow give outwards to whole ones (yarn); null for true."""
    attention_factor: float | None = Field(None, gt=0)
    """Factor of queries and of keys (yarn); null for 1 + ln(factor) / 10, or for what both mscale give."""
    mscale: float | None = Field(None, ge=0)
    """With mscale_all_dim: weight of ln(factor) / 10 in the numerator of attention_factor (yarn)."""
    mscale_all_dim: float | None = Field(None, ge=0)
    """The same for the denominator."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeScaling":
        needed, allowed = _SETTINGS[self.rope_type]
        given = {name for name, value in self if value is not None} - {"rope_type", "factor"}
        if missing := sorted(needed - given):
            raise ValueError(f"rope_type {self.rope_type!r} needs {', '.join(missing)}")
        if unknown := sorted(given - needed - allowed):
            raise ValueError(f"rope_type {self.rope_type!r} has no {', '.join(unknown)}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor:g}: expected less than high_freq_factor = "
                f"{self.high_freq_factor:g}"
            )
        return self

    @property
    def magnitude(self) -> float:
        """Factor of queries and keys after they are turned (YaRN, arXiv 2309.00071, section 3.4)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(max(self.factor, 1))
        if self.mscale and self.mscale_all_dim:
            return (growth * self.mscale + 1) / (growth * self.mscale_all_dim + 1)
        return growth + 1


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
