"""The last bound on the reward of a response."""

from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class ClipConfig(Config):
    """A bound on the reward of a response."""

    range: float | None = Field(default=5.0, gt=0)
    """Clip to +-range; null: no clipping."""


class Clip(Term[ClipConfig]):
    """Rewards stay in a range."""

    config_class = ClipConfig

    @property
    def is_active(self) -> bool:
        return self.config.range is not None

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert self.config.range is not None
        return reward.clamp(-self.config.range, self.config.range)
