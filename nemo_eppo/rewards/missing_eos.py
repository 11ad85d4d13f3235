"""Penalty for responses that were cut off."""

import torch
from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import MissingEosConfig


class MissingEos(Term[MissingEosConfig]):
    """Subtracts the penalty from responses that ended without EOS or a stop string."""

    config_class = MissingEosConfig

    @property
    def is_active(self) -> bool:
        return self.config.penalty > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return torch.where(inputs.truncated, reward - self.config.penalty, reward)
