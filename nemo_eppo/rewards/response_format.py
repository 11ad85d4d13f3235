"""Penalty for responses whose text breaks a rule, such as a format to keep or a language to avoid."""

import re

import torch
from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import ResponseFormatConfig


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
