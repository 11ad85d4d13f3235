"""Penalty for responses whose latents the SFT model would hardly produce."""

from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class LatentPenaltyConfig(Config):
    """Penalty on the distance of a response's latents from those of the SFT model (InfoRM, arXiv 2402.09345)."""

    gamma: float = Field(default=0.0, ge=0)
    """Weight of the penalty, per standard deviation; 0: no penalty. Needs a reward model of kind inform."""


class LatentPenalty(Term[LatentPenaltyConfig]):
    """Subtracts `gamma * D`, D the Mahalanobis distance of the latents from those of the SFT model's responses."""

    config_class = LatentPenaltyConfig
    needs = ("latents",)

    @property
    def is_active(self) -> bool:
        return self.config.gamma > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.latents is not None
        return reward - self.config.gamma * inputs.latents.double().norm(dim=1)
