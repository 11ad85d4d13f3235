"""The KL penalty per token: how large it is, where it is placed, and how its coefficient changes."""

from typing import Any

from torch import Tensor

from nemo_eppo.algorithms.divergences import kl_estimate
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.settings.shaping import KLPenaltyConfig


class KLPenalty:
    """The penalty, with the coefficient of the current step; `end_step` sets the next step's."""

    def __init__(self, config: KLPenaltyConfig) -> None:
        self.config = config
        self.coefficient = config.coefficient
        """beta in this step."""
        self._is_set = False

    @property
    def is_in_reward(self) -> bool:
        """Whether the penalty is to be added to the rewards, see `token_rewards`."""
        return self.coefficient > 0 and self.config.placement == "reward"

    @property
    def loss_coefficient(self) -> float:
        """beta if the penalty is placed in the policy's loss, else 0."""
        return self.coefficient if self.config.placement == "loss" else 0.0

    def set_coefficient(self, coefficient: float) -> None:
        """Set beta from outside, as the hacking monitor does."""
        self.coefficient, self._is_set = coefficient, True

    def token_rewards(self, inputs: RewardInputs) -> Tensor:
        """Return the penalty's (negative) reward of each action: fp64 [B, T], zero outside the mask."""
        assert inputs.ref_logprobs is not None
        kl = kl_estimate(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask, self.config.estimator)
        return -self.coefficient * kl

    def end_step(self, kl: float, responses: int) -> None:
        """Set beta for the next step; `kl` is the mean KL of this step's `responses`, in nats.

        The adaptive controller multiplies it by `1 + error * responses / horizon`, with the relative error of the KL
        clipped to 0.2 (Ziegler et al. 2019, arXiv 1909.08593).
        """
        if self.config.controller == "adaptive":
            assert self.config.target is not None
            assert self.config.horizon is not None
            error = min(max(kl / self.config.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * responses / self.config.horizon

    def state_dict(self) -> dict[str, Any]:
        is_adaptive = self.config.controller == "adaptive"
        return {"coefficient": self.coefficient, "is_adaptive": is_adaptive, "is_set": self._is_set}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. A fixed coefficient that was never set from outside has its configured value, which may be new."""
        kept = state["is_set"] or (self.config.controller == "adaptive" and state["is_adaptive"])
        self.coefficient = float(state["coefficient"]) if kept else self.config.coefficient
        self._is_set = bool(state["is_set"])
