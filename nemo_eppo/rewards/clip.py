"""Clips the reward of a response to a range."""

from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import ClipConfig


class Clip(Term[ClipConfig]):
    """Clips rewards to [-range, range]."""

    config_class = ClipConfig

    @property
    def is_active(self) -> bool:
        return self.config.range is not None

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return clipped(reward, self.config)


def clipped(reward: Tensor, config: ClipConfig) -> Tensor:
    """Clip a reward to [-range, range], if there is a range."""
    return reward if config.range is None else reward.clamp(-config.range, config.range)
