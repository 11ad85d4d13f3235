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
    """Which divergence is penalised: `none`, `kl`, `chi2`, or `sqrt_chi2`, which the paper's RLHF runs use."""
    coefficient: float = Field(default=0.0, ge=0)
    """Weight of the penalty (the paper's: 8e-4 for sqrt_chi2); 0 if kind is none."""
    placement: Literal["reward", "loss"] = "loss"
    """Whether the penalty is added to the policy's loss or subtracted from the reward. At the policy that sampled, the
    expected gradient in the loss is that of KL(ref||policy) for kl and of chi2(policy||ref)/2 + KL(ref||policy) for
    chi2; in the reward, that of KL(policy||ref) for kl and of chi2(policy||ref)/2 for chi2. For sqrt_chi2 it is chi2's
    divided by 2*sqrt(chi2)."""

    @model_validator(mode="after")
    def _complete(self) -> "DivergenceConfig":
        if (self.kind == "none") != (self.coefficient == 0):
            raise ValueError(f"kind '{self.kind}' with coefficient {self.coefficient}: set both, or neither")
        return self

    @property
    def in_loss(self) -> bool:
        return self.kind != "none" and self.placement == "loss"


class DivergencePenalty(Term[DivergenceConfig]):
    """Turns a reward r into `r - c*L` (kl), `r - c*rho` (chi2) or `r - c*rho / (2*sqrt(chi2))` (sqrt_chi2).

    `L` is the log-ratio of the response, `rho = exp(L) - 1`, and chi2 the mean over the global batch. The penalty
    comes after the clip, which limits what reward models give.
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
