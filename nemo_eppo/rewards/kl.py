"""The KL penalty per token: what it costs, where it is placed, and how its coefficient moves."""

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.algorithms.controllers import AdaptiveKLController, FixedCoefficient
from nemo_eppo.algorithms.divergences import KLEstimator, kl_estimate
from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs


class KLPenaltyConfig(Config):
    """Distance to the reference policy, per token."""

    coefficient: float = Field(default=0.0, ge=0)
    """beta; with the adaptive controller, its start. 0: no penalty."""
    estimator: KLEstimator = "k1"
    """Per-token estimator."""
    placement: Literal["reward", "loss"] = "reward"
    """Subtract it from each token's reward, or add it to the policy's loss; never both."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` steers the mean KL of a response to `target` (Ziegler et al. 2019)."""
    target: float | None = Field(default=None, gt=0)
    """Mean KL to steer to, in nats per response; adaptive only."""
    horizon: int | None = Field(default=None, gt=0)
    """Responses over which the coefficient adapts; adaptive only."""
    report: bool = True
    """Report kl/policy_reference also where nothing else needs the reference's log-probs; false then saves a forward
    pass per step."""

    @model_validator(mode="after")
    def _adaptive_is_complete(self) -> "KLPenaltyConfig":
        if self.controller == "adaptive" and (self.target is None or self.horizon is None or self.coefficient == 0):
            raise ValueError("controller 'adaptive' needs target, horizon and a coefficient above 0")
        return self


class KLPenalty:
    """The penalty with the coefficient of the current step, which `end_step` moves on."""

    def __init__(self, config: KLPenaltyConfig) -> None:
        self.config = config
        self._controller: FixedCoefficient | AdaptiveKLController = FixedCoefficient(config.coefficient)
        self._is_set = False
        if config.controller == "adaptive" and config.target and config.horizon:
            self._controller = AdaptiveKLController(config.coefficient, config.target, config.horizon)

    @property
    def coefficient(self) -> float:
        """beta of this step."""
        return self._controller.value

    @property
    def is_in_reward(self) -> bool:
        """Whether `token_rewards` gives anything."""
        return self.coefficient > 0 and self.config.placement == "reward"

    @property
    def loss_coefficient(self) -> float:
        """beta if the penalty is placed in the policy's loss, else 0."""
        return self.coefficient if self.config.placement == "loss" else 0.0

    def set_coefficient(self, coefficient: float) -> None:
        """Set beta from outside, as the hacking monitor does."""
        self._controller.value, self._is_set = coefficient, True

    def token_rewards(self, inputs: RewardInputs) -> Tensor:
        """fp64 [B, T]: what the penalty adds to each action's reward."""
        assert inputs.ref_logprobs is not None
        kl = kl_estimate(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask, self.config.estimator)
        return -self.coefficient * kl

    def end_step(self, kl: float, responses: int) -> None:
        """Move beta: `kl` is the mean over this step's `responses`, in nats."""
        self._controller.update(kl, responses)

    def state_dict(self) -> dict[str, Any]:
        is_adaptive = self.config.controller == "adaptive"
        return {"coefficient": self.coefficient, "is_adaptive": is_adaptive, "is_set": self._is_set}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. A fixed coefficient that nobody has set keeps the configured value: a run may change it."""
        if state["is_set"] or (self.config.controller == "adaptive" and state["is_adaptive"]):
            self._controller.value = float(state["coefficient"])
            self._is_set = bool(state["is_set"])
