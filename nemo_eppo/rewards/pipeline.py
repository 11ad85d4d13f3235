"""From raw scores to per-token rewards, in one fixed order that the ledger records.

Standardise each score -> combine reward models, add functions -> the terms in the order of ShapingConfig's fields, each
of the user's own where its `after` says -> place the result at the last action -> KL penalty per token.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_eppo.algorithms.divergences import kl_estimate
from nemo_eppo.algorithms.ensembles import check_models, combine_scores
from nemo_eppo.algorithms.masking import last_action, require_finite
from nemo_eppo.config import ConfigError
from nemo_eppo.rewards.clip import clipped
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.kl import KLPenalty
from nemo_eppo.rewards.ledger import Ledger
from nemo_eppo.rewards.shaping import build_terms
from nemo_eppo.settings.shaping import ShapingConfig


class ShapedRewards(NamedTuple):
    """The shaped rewards of a batch."""

    token_rewards: Tensor
    """fp32 [B, T]: the response's reward at its last action, less the KL penalty of every action."""
    ledger: Ledger
    """What each term added to each response's reward."""


class RewardPipeline:
    """Shapes the rewards of one global batch per step. Its outputs depend on inputs and state only: all ranks agree."""

    def __init__(self, config: ShapingConfig) -> None:
        """ConfigError if a user's term cannot be loaded."""
        self.config = config
        self.terms = build_terms(config)
        self.kl = KLPenalty(config.kl)

    @property
    def needs(self) -> set[str]:
        """Names of the optional fields of RewardInputs that a run with these settings has to fill."""
        needed = {field for term in self.terms.values() if term.is_active for field in term.needs}
        if self.kl.coefficient > 0 or self.kl.config.report or self.config.divergence.in_loss:
            needed.add("ref_logprobs")
        return needed

    def __call__(self, inputs: RewardInputs) -> ShapedRewards:
        """Shape the rewards and advance the running statistics by one step.

        Raises:
            ValueError: an input is missing, or a number is not finite; the message names it and the sample.
        """
        inputs.validate()
        self._require(inputs)
        ledger = Ledger(observations=_observe(inputs))
        reward = self.combine(inputs.scores, inputs.columns)
        ledger.contributions["reward/proxy"] = reward
        for name, term in self.terms.items():
            if not term.is_active:
                continue
            shaped = term(inputs, reward.clone())  # a term may work in place
            if not isinstance(shaped, Tensor) or shaped.shape != reward.shape:
                found = f"shape {tuple(shaped.shape)}" if isinstance(shaped, Tensor) else type(shaped).__name__
                raise ValueError(f"reward/{name}: {found}; expected a tensor of shape {tuple(reward.shape)}")
            shaped = shaped.to(reward.dtype)
            require_finite(f"reward/{name}", shaped)
            ledger.contributions[f"reward/{name}"] = shaped - reward
            reward = shaped

        token_rewards = torch.zeros(inputs.mask.shape, dtype=torch.float64)
        if self.kl.is_in_reward:
            token_rewards = self.kl.token_rewards(inputs)
            ledger.contributions["reward/kl"] = token_rewards.sum(dim=1)
        token_rewards = token_rewards.scatter_add(1, last_action(inputs.mask)[:, None], reward[:, None])
        return ShapedRewards(token_rewards.float(), ledger)

    def combine(self, scores: Tensor, columns: Sequence[Column]) -> Tensor:
        """Return the proxy reward, fp64 [B]: the raw scores [B, k] standardised, weighted and combined.

        Raises:
            ValueError: a score is not finite, or `shaping.combine` does not take this number of reward models.
        """
        require_finite("scores", scores)
        mean, std, weight = torch.tensor(
            [[column.mean, column.std, column.weight] for column in columns], dtype=torch.float64
        ).unbind(1)
        standard = (scores.double() - mean) / std * weight
        is_model = torch.tensor([column.is_model for column in columns])
        reward = standard[:, ~is_model].sum(dim=1)
        if is_model.any():
            config = self.config
            reward += combine_scores(standard[:, is_model], config.combine, config.uwo_lambda, config.uwo_ddof)
        return reward

    def baseline(self, scores: Tensor, columns: Sequence[Column]) -> Tensor:
        """Return the proxy reward, fp32 [B], clipped as the shaped reward that it is subtracted from."""
        return clipped(self.combine(scores, columns), self.config.clip).float()

    def check_sources(self, columns: Sequence[Column], latent_size: int) -> None:
        """ConfigError if these reward sources do not fit the settings; `latent_size` is 0 if no model gives latents."""
        for name, term in self.terms.items():
            if term.is_active and "latents" in term.needs and latent_size == 0:
                raise ConfigError(
                    f"shaping.{name} ({term.config}) needs latents, but none of the reward models in rewards gives "
                    "any; expected one of kind inform, or a run without this term"
                )
        for column in columns:
            if not column.std > 0:
                raise ConfigError(f"rewards: {column.name} has a standard deviation of {column.std}; expected above 0")
        if models := sum(column.is_model for column in columns):
            try:
                check_models(models, self.config.combine)
            except ValueError as error:
                raise ConfigError(f"rewards, shaping.combine: {error}") from None

    def _require(self, inputs: RewardInputs) -> None:
        """ValueError for an optional input that is missing although a term needs it."""
        needs = {f"shaping.{name}": term.needs for name, term in self.terms.items() if term.is_active}
        if self.kl.coefficient > 0:
            needs["shaping.kl"] = ("ref_logprobs",)
        for name, fields in needs.items():
            if missing := [field for field in fields if getattr(inputs, field) is None]:
                raise ValueError(f"{', '.join(missing)}: needed for {name}, but missing")

    def state_dict(self) -> dict[str, Any]:
        """The terms' running statistics and the state of the KL coefficient."""
        statistics = {name: term.statistics.state_dict() for name, term in self.terms.items()}
        return {"statistics": statistics, "kl": self.kl.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken; a term that is new since then starts with empty statistics."""
        for name, term in self.terms.items():
            if name in state["statistics"]:
                term.statistics.load_state_dict(state["statistics"][name])
        self.kl.load_state_dict(state["kl"])


def _observe(inputs: RewardInputs) -> dict[str, Tensor]:
    seen = {f"reward/score_{i}": column.double() for i, column in enumerate(inputs.scores.unbind(dim=1))}
    if inputs.latents is not None:
        seen["reward/latent_distance"] = inputs.latents.double().norm(dim=1)
    seen["energy/policy"] = inputs.energies.double().sum(dim=1)  # over modules, as the penalty and `nemo-eppo score` do
    if inputs.ref_energies is not None:
        seen["energy/reference"] = inputs.ref_energies.double().sum(dim=1)
        seen["energy/difference"] = (inputs.ref_energies.double() - inputs.energies.double()).abs().sum(dim=1)
    if inputs.ref_logprobs is not None:
        kl = kl_estimate(inputs.logprobs.double(), inputs.ref_logprobs.double(), inputs.mask, "k1")
        seen["kl/policy_reference"] = kl.sum(dim=1)
    return seen
