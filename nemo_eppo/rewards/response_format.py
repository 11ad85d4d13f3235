"""Penalty for responses whose text breaks a rule, such as a format to keep or a language to avoid."""

import re

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class ResponseFormatConfig(Config):
    """Rules for the response's text, as regular expressions (Python's `re.search`; `.` matches newlines too)."""

    require: str | None = None
    """Pattern that has to be found, such as `^<think>.*</think>`; null: no such rule."""
    forbid: str | None = None
    """Pattern that must not be found, such as `[\\u4e00-\\u9fff]` to keep Chinese out; null: no such rule."""
    penalty: float = Field(default=0.0, ge=0)
    """Reward lost for each of the two rules that a response breaks; 0: no penalty."""

    @field_validator("require", "forbid")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"expected a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormatConfig":
        has_pattern = self.require is not None or self.forbid is not None
        if has_pattern != (self.penalty > 0):
            raise ValueError(
                f"penalty {self.penalty} with require {self.require!r}, forbid {self.forbid!r}: set a "
                "penalty and at least one pattern, or neither"
            )
        return self


class ResponseFormat(Term[ResponseFormatConfig]):
    """Subtracts the penalty for each rule that a response breaks."""

    config_class = ResponseFormatConfig

    @property
    def is_active(self) -> bool:
        return self.config.penalty > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        broken = [
            sum(
                pattern is not None and (re.search(pattern, sample.response, re.DOTALL) is not None) != is_required
                for pattern, is_required in ((self.config.require, True), (self.config.forbid, False))
            )
            for sample in inputs.samples
        ]
        return reward - self.config.penalty * torch.tensor(broken).to(reward)
