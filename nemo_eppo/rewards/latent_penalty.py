"""The InfoRM indicator as a penalty: responses whose latents the SFT model would hardly produce."""

from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.terms import RewardInputs, Term


class LatentPenaltyConfig(Config):
    """`r - gamma * D`, D the Mahalanobis distance in the reward model's latent space (arXiv 2402.09345)."""

    gamma: float = Field(default=0.0, ge=0)
    """Weight; 0: no penalty. Needs a reward model of kind inform."""


class LatentPenalty(Term[LatentPenaltyConfig]):
    """Distance from the latents of the SFT model's responses, in standard deviations of these."""

    metric = "reward/latent_penalty"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        gamma = self.config.gamma
        if gamma == 0:
            return reward
        if inputs.latents is None:
            raise ValueError(f"latents: needed for the latent penalty (gamma = {gamma})")
        return reward - gamma * inputs.latents.double().norm(dim=1)
