"""Penalty for long responses, in three forms."""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class LengthPenaltyConfig(Config):
    """Penalty for long responses."""

    kind: Literal["none", "authors", "linear", "soft_overlong"] = "none"
    """What is added to the reward of a response of `len` tokens. `authors`: `(1 - len/length) * sigma`, sigma the
    running standard deviation of the reward; `linear`: `-coefficient * max(0, len - length)`; `soft_overlong` (DAPO,
    arXiv 2503.14476): a ramp from 0 to `-coefficient` over the last `buffer` tokens before `length`."""
    length: int | None = Field(default=None, gt=0)
    """Response tokens at which the penalty starts, or `soft_overlong` is full. Required unless kind is none."""
    coefficient: float = Field(default=1.0, gt=0)
    """Reward lost per token beyond `length` (`linear`), or at `length` (`soft_overlong`); `authors` does not use it."""
    buffer: int | None = Field(default=None, gt=0)
    """Width of the ramp of `soft_overlong` in tokens; the other kinds do not use it."""

    @model_validator(mode="after")
    def _complete(self) -> "LengthPenaltyConfig":
        if self.kind != "none" and self.length is None:
            raise ValueError(f"kind '{self.kind}' needs length")
        if self.kind == "soft_overlong" and (self.buffer is None or self.buffer > (self.length or 0)):
            raise ValueError(f"kind 'soft_overlong' needs a buffer of at most length; got {self.buffer}")
        return self


class LengthPenalty(Term[LengthPenaltyConfig]):
    """Adds what LengthPenaltyConfig.kind says."""

    config_class = LengthPenaltyConfig

    @property
    def is_active(self) -> bool:
        return self.config.kind != "none"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config, lengths = self.config, inputs.response_lengths.to(reward)
        assert config.length is not None
        if config.kind == "authors":
            self.statistics.update(reward)
            return reward + (1 - lengths / config.length) * self.statistics.std
        if config.kind == "linear":
            return reward - config.coefficient * (lengths - config.length).clamp(min=0)
        buffer = float(config.buffer or 0)
        return reward - config.coefficient * (lengths - config.length + buffer).clamp(0, buffer) / buffer
