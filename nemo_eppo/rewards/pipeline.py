"""From reward-model scores to per-token rewards, in one fixed order that the ledger records.

Standardise each reward model -> combine -> latent penalty -> length penalty -> missing-EOS penalty -> energy penalty ->
clip -> divergence penalty -> pay at the last action -> KL penalty per token. The user's own terms stand where they say.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.algorithms.controllers import AdaptiveKLController, FixedCoefficient
from nemo_eppo.algorithms.divergences import KLEstimator, kl_estimate
from nemo_eppo.algorithms.ensembles import Combine, check_models, combine_scores
from nemo_eppo.algorithms.masking import last_action, require_finite
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.rewards.divergence import DivergenceConfig, DivergencePenalty
from nemo_eppo.rewards.latent_penalty import LatentPenalty, LatentPenaltyConfig
from nemo_eppo.rewards.ledger import Ledger
from nemo_eppo.rewards.terms import (
    Clip,
    ClipConfig,
    EnergyPenalty,
    EnergyPenaltyConfig,
    LengthPenalty,
    LengthPenaltyConfig,
    MissingEosPenalty,
    MissingEosPenaltyConfig,
    RewardInputs,
    Term,
)
from nemo_eppo.rewards.user_terms import UserTermConfig, load_term


class KLPenaltyConfig(Config):
    """Distance to the reference policy."""

    coefficient: float = Field(default=0.0, ge=0)
    """beta; with the adaptive controller, its start. 0: no penalty."""
    estimator: KLEstimator = "k1"
    """Per-token estimator."""
    placement: Literal["reward", "loss"] = "reward"
    """Subtract it from each token's reward, or let the trainer add it to the policy loss; never both."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`adaptive` steers the mean KL of a response to `target` (Ziegler et al. 2019)."""
    target: float | None = Field(default=None, gt=0)
    """Nats per response; adaptive only."""
    horizon: int | None = Field(default=None, gt=0)
    """Responses over which the coefficient adapts; adaptive only."""

    @model_validator(mode="after")
    def _adaptive_is_complete(self) -> "KLPenaltyConfig":
        if self.controller == "adaptive" and (self.target is None or self.horizon is None or self.coefficient == 0):
            raise ValueError("controller 'adaptive' needs target, horizon and a coefficient above 0")
        return self


class RewardConfig(Config):
    """The whole composition."""

    standardize: bool = True
    """Subtract each reward model's own validation mean and divide by its std."""
    combine: Combine = "single"
    """How scores of several reward models become one: `single` insists on one model; `mean`; `wco`, the lowest; `uwo`,
    the mean less uwo_lambda times the variance over models (arXiv 2310.02743)."""
    uwo_lambda: float = Field(default=0.1, ge=0)
    """uwo only."""
    uwo_ddof: Literal[0, 1] = 0
    """uwo only; 0: variance of the population, 1: of a sample."""
    latent_penalty: LatentPenaltyConfig = LatentPenaltyConfig()
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()
    missing_eos: MissingEosPenaltyConfig = MissingEosPenaltyConfig()
    energy: EnergyPenaltyConfig = EnergyPenaltyConfig()
    reward_clip: ClipConfig = ClipConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    kl: KLPenaltyConfig = KLPenaltyConfig()
    terms: tuple[UserTermConfig, ...] = ()
    """Terms of one's own."""

    @model_validator(mode="after")
    def _kl_in_one_place(self) -> "RewardConfig":
        both = self.kl.coefficient > 0 and self.divergence.kind == "kl"
        if both and self.kl.placement != self.divergence.placement:
            raise ValueError(
                f"kl.placement = '{self.kl.placement}', divergence.placement = '{self.divergence.placement}': they put "
                "the KL divergence into the reward and into the loss at once; expected one place"
            )
        return self


@dataclass(frozen=True)
class RewardResult:
    """The shaped reward of a batch."""

    token_rewards: Tensor
    """fp32 [B, T]: the response's reward at its last action, less the KL penalty of every action."""
    ledger: Ledger
    kl_loss_coefficient: float
    """What the policy loss has to multiply its KL term with in this step; 0 unless the KL is placed in the loss."""


class RewardPipeline:
    """Shapes the rewards of one global batch per step. Same inputs, same state: same outputs, on every rank."""

    def __init__(self, config: RewardConfig) -> None:
        """Raises ConfigError for a user's term that cannot be loaded."""
        self.config = config
        built_in: list[Term[Any]] = [
            LatentPenalty(config.latent_penalty),
            LengthPenalty(config.length_penalty),
            MissingEosPenalty(config.missing_eos),
            EnergyPenalty(config.energy),
            Clip(config.reward_clip),
            DivergencePenalty(config.divergence),
        ]
        self.terms = [load_term(own) for own in config.terms if own.after == "proxy"]
        for term in built_in:
            self.terms += [term, *(load_term(own) for own in config.terms if f"reward/{own.after}" == term.metric)]
        names = ["reward/proxy", *(term.metric for term in self.terms), "reward/kl", "reward/final"]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"ppo.terms: the name {', '.join(twice)} is taken")
        self.kl_controller: FixedCoefficient | AdaptiveKLController = FixedCoefficient(config.kl.coefficient)
        if config.kl.controller == "adaptive" and config.kl.target and config.kl.horizon:
            self.kl_controller = AdaptiveKLController(config.kl.coefficient, config.kl.target, config.kl.horizon)

    def __call__(self, inputs: RewardInputs) -> RewardResult:
        """Shape the rewards and advance the running statistics and the KL controller by one step.

        Raises:
            ValueError: for missing inputs, and for NaN or infinities, naming the quantity and the sample.
        """
        inputs.validate()
        ledger = Ledger(observations=_observe(inputs))
        reward = self.combine(inputs.scores, inputs.score_mean, inputs.score_std)
        ledger.contributions["reward/proxy"] = reward
        for term in self.terms:
            shaped = term(inputs, reward)
            require_finite(term.metric, shaped)
            ledger.contributions[term.metric] = shaped - reward
            reward = shaped

        token_rewards = torch.zeros(inputs.mask.shape, dtype=reward.dtype, device=reward.device)
        token_rewards.scatter_(1, last_action(inputs.mask)[:, None], reward[:, None])
        coefficient = self.kl_controller.value
        kl_rewards = self._kl_rewards(inputs, coefficient)
        ledger.contributions["reward/kl"] = kl_rewards.sum(dim=1)
        if "kl/policy_reference" in ledger.observations:
            self.kl_controller.update(ledger.observations["kl/policy_reference"].mean().item(), len(reward))
        in_loss = self.config.kl.placement == "loss"
        return RewardResult((token_rewards + kl_rewards).float(), ledger, coefficient if in_loss else 0.0)

    def combine(self, scores: Tensor, score_mean: Tensor | None, score_std: Tensor | None) -> Tensor:
        """The proxy reward, fp64 [B]: the scores [B, k] of the reward models, standardised, as one number per response.

        Raises:
            ValueError: for NaN, for missing or impossible statistics [k], and for a k that `combine` does not take.
        """
        require_finite("scores", scores)
        scores = scores.double()
        if self.config.standardize:
            if score_mean is None or score_std is None:
                raise ValueError("score_mean, score_std: needed to standardise; or set standardize to false")
            usable = torch.isfinite(score_mean).all() and torch.isfinite(score_std).all() and (score_std > 0).all()
            if not usable or not score_mean.shape == score_std.shape == scores.shape[1:]:
                raise ValueError(
                    f"score_mean, score_std: {score_mean.tolist()}, {score_std.tolist()}; "
                    f"expected {scores.shape[1]} finite numbers each, the std above 0"
                )
            scores = (scores - score_mean.double()) / score_std.double()
        return combine_scores(scores, self.config.combine, self.config.uwo_lambda, self.config.uwo_ddof)

    def check_models(self, models: int, latent_size: int) -> None:
        """ConfigError if the settings ask for what so many reward models, with latents of this size, do not give."""
        if self.config.latent_penalty.gamma > 0 and latent_size == 0:
            raise ConfigError(
                f"ppo.latent_penalty.gamma = {self.config.latent_penalty.gamma}: the reward models at servers.rewards "
                "give no latents; expected a model of kind inform, or gamma 0"
            )
        try:
            check_models(models, self.config.combine)
        except ValueError as error:
            raise ConfigError(f"servers.rewards, ppo.combine: {error}") from None

    def _kl_rewards(self, inputs: RewardInputs, coefficient: float) -> Tensor:
        nothing = torch.zeros(inputs.mask.shape, dtype=torch.float64, device=inputs.mask.device)
        if coefficient == 0:
            return nothing
        if inputs.logprobs is None or inputs.ref_logprobs is None:
            raise ValueError(f"logprobs, ref_logprobs: needed for the KL penalty (coefficient = {coefficient})")
        if self.config.kl.placement == "loss":
            return nothing
        kl = kl_estimate(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask, self.config.kl.estimator)
        return -coefficient * kl

    def state_dict(self) -> dict[str, Any]:
        """Running statistics and the KL controller."""
        state: dict[str, Any] = {term.metric: term.statistics.state_dict() for term in self.terms}
        return {**state, "kl_controller": self.kl_controller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a term or an adaptive controller that was not there then starts now."""
        for term in self.terms:
            if term.metric in state:
                term.statistics.load_state_dict(state[term.metric])
        if state["kl_controller"]:
            self.kl_controller.load_state_dict(state["kl_controller"])


def _observe(inputs: RewardInputs) -> dict[str, Tensor]:
    seen = {f"reward/score_{i}": column.double() for i, column in enumerate(inputs.scores.unbind(dim=1))}
    if inputs.latents is not None:
        seen["reward/latent_distance"] = inputs.latents.double().norm(dim=1)
    if inputs.policy_energy is not None:
        seen["energy/policy"] = inputs.policy_energy.double().mean(dim=1)
        if inputs.reference_energy is not None:
            seen["energy/reference"] = inputs.reference_energy.double().mean(dim=1)
            difference = inputs.reference_energy.double() - inputs.policy_energy.double()
            seen["energy/difference"] = difference.abs().mean(dim=1)
    if inputs.logprobs is not None and inputs.ref_logprobs is not None:
        kl = kl_estimate(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask, "k1")
        seen["kl/policy_reference"] = kl.sum(dim=1)
    return seen
