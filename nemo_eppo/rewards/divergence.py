"""The distance of whole responses from the reference policy as a penalty, in the reward or in the policy's loss."""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.algorithms.divergences import DivergenceKind, divergence_slope, sequence_divergence
from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class DivergenceConfig(Config):
    """Chi-squared or KL divergence of whole responses (Correlated Proxies, arXiv 2403.03185)."""

    kind: DivergenceKind = "none"
    """`kl`, `chi2`, or `sqrt_chi2`, which the paper's RLHF runs use."""
    coefficient: float = Field(default=0.0, ge=0)
    """Weight; the paper's: 8e-4 for sqrt_chi2."""
    placement: Literal["reward", "loss"] = "loss"
    """Add it to the policy's loss, or take it off the reward; never both. At the policy that sampled, the loss has the
    expected gradient of KL(ref||policy) for kl, of chi2(policy||ref)/2 + KL(ref||policy) for chi2; the reward that of
    KL(policy||ref) for kl, of chi2(policy||ref)/2 for chi2. Those of sqrt_chi2 are chi2's, over 2*sqrt(chi2)."""

    @model_validator(mode="after")
    def _complete(self) -> "DivergenceConfig":
        if (self.kind == "none") != (self.coefficient == 0):
            raise ValueError(f"kind '{self.kind}' with coefficient {self.coefficient}: set both, or neither")
        return self

    @property
    def in_loss(self) -> bool:
        return self.kind != "none" and self.placement == "loss"


class DivergencePenalty(Term[DivergenceConfig]):
    """`r - c*L`, `r - c*rho` or `r - c*rho / (2*sqrt(chi2))`, chi2 over the global batch.

    `L` is the log-ratio of the response, `rho = exp(L) - 1`. It is paid after the clip, which is for reward models.
    """

    config_class = DivergenceConfig
    needs = ("ref_logprobs",)

    @property
    def is_active(self) -> bool:
        return self.config.kind != "none" and self.config.placement == "reward"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config = self.config
        assert inputs.ref_logprobs is not None
        found = sequence_divergence(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask)
        slope = divergence_slope(found.chi2.mean().item(), config.kind)
        return reward - config.coefficient * slope * (found.log_ratio if config.kind == "kl" else found.ratio)
