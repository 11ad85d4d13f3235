"""The distance of whole responses from the reference policy as a penalty, in the reward or in the policy's loss."""

from torch import Tensor

from nemo_eppo.algorithms.divergences import divergence_slope, sequence_divergence
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import DivergenceConfig


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
        divergence = sequence_divergence(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask)
        slope = divergence_slope(divergence.chi2.mean().item(), config.kind)
        return reward - config.coefficient * slope * (divergence.log_ratio if config.kind == "kl" else divergence.ratio)
