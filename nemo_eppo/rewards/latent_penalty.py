"""Penalty for responses whose latents the SFT model would hardly produce."""

from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import LatentPenaltyConfig


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
