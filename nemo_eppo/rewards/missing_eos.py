"""Penalty for responses that were cut off."""

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class MissingEosConfig(Config):
    """Penalty for a response that was cut off."""

    penalty: float = Field(default=0.0, ge=0)
    """Reward that a response without EOS or a stop string loses; 0: no penalty."""


class MissingEos(Term[MissingEosConfig]):
    """Subtracts the penalty from responses that ended without EOS or a stop string."""

    config_class = MissingEosConfig

    @property
    def is_active(self) -> bool:
        return self.config.penalty > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return torch.where(inputs.truncated, reward - self.config.penalty, reward)
