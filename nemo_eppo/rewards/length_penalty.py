"""PPO with a length penalty: long responses get less."""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class LengthPenaltyConfig(Config):
    """Less reward for long responses."""

    kind: Literal["none", "authors", "linear", "soft_overlong"] = "none"
    """`authors`: `+ (1 - len/length) * sigma`, sigma the running std of the reward; `linear`: `- coefficient *
    max(0, len - length)`; `soft_overlong` (DAPO, arXiv 2503.14476): a ramp from 0 to `-coefficient` over the last
    `buffer` tokens before `length`."""
    length: int | None = Field(default=None, gt=0)
    """N in response tokens; for `soft_overlong` the longest response."""
    coefficient: float = Field(default=1.0, gt=0)
    """Weight: per token for `linear`, in all for `soft_overlong`; `authors` does not use it."""
    buffer: int | None = Field(default=None, gt=0)
    """Width of the ramp of `soft_overlong`, in tokens."""

    @model_validator(mode="after")
    def _complete(self) -> "LengthPenaltyConfig":
        if self.kind != "none" and self.length is None:
            raise ValueError(f"kind '{self.kind}' needs length")
        if self.kind == "soft_overlong" and (self.buffer is None or self.buffer > (self.length or 0)):
            raise ValueError(f"kind 'soft_overlong' needs a buffer of at most length; got {self.buffer}")
        return self


class LengthPenalty(Term[LengthPenaltyConfig]):
    """Three forms of the penalty; see LengthPenaltyConfig."""

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
