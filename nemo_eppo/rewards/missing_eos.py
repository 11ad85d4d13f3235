"""Less reward for responses that were cut off."""

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class MissingEosConfig(Config):
    """Less reward for a response that was cut off."""

    penalty: float = Field(default=0.0, ge=0)
    """Subtracted if the response ended without EOS; 0: no penalty."""


class MissingEos(Term[MissingEosConfig]):
    """Responses that ended without EOS get less."""

    config_class = MissingEosConfig

    @property
    def is_active(self) -> bool:
        return self.config.penalty > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return torch.where(inputs.truncated, reward - self.config.penalty, reward)
