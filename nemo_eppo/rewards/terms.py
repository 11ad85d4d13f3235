"""The terms of the shaped reward. A term maps (inputs, reward [B]) to a reward [B] and may keep running statistics."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nemo_eppo.algorithms.energy import Sided, apply_floor, energy_difference
from nemo_eppo.algorithms.masking import require_finite
from nemo_eppo.config import Config, ConfigT


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """What the reward of B responses depends on; k reward models, E energy modules."""

    scores: Tensor
    """[B, k] as the reward models gave them."""
    score_mean: Tensor | None = None
    """[k] each model's mean on its own validation data; needed to standardise."""
    score_std: Tensor | None = None
    """[k] likewise its standard deviation."""
    mask: Tensor
    """bool [B, T]."""
    truncated: Tensor
    """bool [B]: ended without EOS."""
    policy_energy: Tensor | None = None
    """[B, E] mean energy loss of the response under the policy."""
    reference_energy: Tensor | None = None
    """[B, E] under the reference, on its own answer or on the same one."""
    logprobs: Tensor | None = None
    """[B, T] of the policy."""
    ref_logprobs: Tensor | None = None
    """[B, T] of the reference."""
    latents: Tensor | None = None
    """[B, D] of the reward models, in coordinates in which those of SFT responses have mean 0 and covariance I."""
    step: int = 1
    """1 for the first step of the run."""
    max_steps: int = 1

    @property
    def response_lengths(self) -> Tensor:
        """int64 [B], EOS included."""
        return self.mask.sum(dim=1)

    def validate(self) -> None:
        """Check shapes and look for NaN and infinities.

        Raises:
            ValueError: naming the quantity, and the sample.
        """
        for one, other in (("policy_energy", "reference_energy"), ("logprobs", "ref_logprobs")):
            if getattr(self, other) is not None and getattr(self, one) is None:
                raise ValueError(f"{one}: needed together with {other}")
        if not 1 <= self.step <= self.max_steps:
            raise ValueError(f"step: {self.step}; expected 1 to max_steps = {self.max_steps}")
        batch, actions = self.mask.shape
        models = self.scores.shape[1] if self.scores.dim() == 2 else 1
        width = self.latents.shape[-1] if self.latents is not None else 1
        modules = self.policy_energy.shape[-1] if self.policy_energy is not None else 1
        for name, x, shape, mask in (
            ("scores", self.scores, (batch, models), None),
            ("truncated", self.truncated, (batch,), None),
            ("policy_energy", self.policy_energy, (batch, modules), None),
            ("reference_energy", self.reference_energy, (batch, modules), None),
            ("latents", self.latents, (batch, width), None),
            ("logprobs", self.logprobs, (batch, actions), self.mask),
            ("ref_logprobs", self.ref_logprobs, (batch, actions), self.mask),
        ):
            if x is None:
                continue
            if x.shape != shape:
                raise ValueError(f"{name}: shape {tuple(x.shape)}; expected {shape}")
            require_finite(name, x, mask)


class RunningStatistics:
    """Mean and standard deviation (population) of all numbers seen in the run (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def update(self, x: Tensor) -> None:
        """Take in the numbers `x` [n]; the batch of a step is the global one, so all ranks agree."""
        n, mean = x.numel(), x.mean().item()
        total, delta = self.count + n, mean - self.mean
        self.squares += (x - mean).square().sum().item() + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


class Term(Generic[ConfigT]):
    """One step of the composition. `statistics` are saved and resumed with the run."""

    metric: ClassVar[str]
    """The ledger's name for what this term adds."""
    config_class: ClassVar[type[Config]] = Config
    """The settings of a user's own term; see `rewards/user_terms.py`."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.statistics = RunningStatistics()

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        """The reward [B] after this term, from the reward [B] before it."""
        raise NotImplementedError


class LengthPenaltyConfig(Config):
    """PPO with a length penalty."""

    kind: Literal["none", "authors", "linear", "soft_overlong"] = "none"
    """`authors`: `+ (1 - len/length) * sigma`, sigma the running std of the reward; `linear`: `- coefficient *
    max(0, len - length)`; `soft_overlong` (DAPO, arXiv 2503.14476): a ramp from 0 to `-coefficient` over the last
    `buffer` tokens before `length`."""
    length: int | None = Field(default=None, gt=0)
    """N in response tokens; for `soft_overlong` the longest response."""
    coefficient: float = Field(default=1.0, gt=0)
    """Per token for `linear`, in all for `soft_overlong`; not used by `authors`."""
    buffer: int | None = Field(default=None, gt=0)
    """Tokens; `soft_overlong` only."""

    @model_validator(mode="after")
    def _complete(self) -> "LengthPenaltyConfig":
        if self.kind != "none" and self.length is None:
            raise ValueError(f"kind '{self.kind}' needs length")
        if self.kind == "soft_overlong" and (self.buffer is None or self.buffer > (self.length or 0)):
            raise ValueError(f"kind 'soft_overlong' needs a buffer of at most length; got {self.buffer}")
        return self


class LengthPenalty(Term[LengthPenaltyConfig]):
    """Long responses get less."""

    metric = "reward/length_penalty"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config, lengths = self.config, inputs.response_lengths.to(reward)
        if config.kind == "none" or config.length is None:
            return reward
        if config.kind == "authors":
            self.statistics.update(reward)
            return reward + (1 - lengths / config.length) * self.statistics.std
        if config.kind == "linear":
            return reward - config.coefficient * (lengths - config.length).clamp(min=0)
        buffer = float(config.buffer or 0)
        return reward - config.coefficient * (lengths - config.length + buffer).clamp(0, buffer) / buffer


class MissingEosPenaltyConfig(Config):
    """A response that was cut off."""

    penalty: float = Field(default=0.0, ge=0)
    """Subtracted if the response ended without EOS."""


class MissingEosPenalty(Term[MissingEosPenaltyConfig]):
    """Responses that ended without EOS get less."""

    metric = "reward/missing_eos"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return torch.where(inputs.truncated, reward - self.config.penalty, reward)


class EnergyPenaltyConfig(Config):
    """EPPO, arXiv 2501.19358: `r - eta * |dE_SFT - dE_RLHF|`."""

    eta: float = Field(default=2.0, ge=0)
    """Weight of the penalty (the authors': 2.0); 0 turns it off, and energies are then only reported."""
    sided: Sided = "both"
    """`rise` punishes only an energy loss above the reference's."""
    floor_ratio: float | None = Field(default=None, ge=0)
    """c: take at most `c * |r|` from a reward r; None: no limit."""
    schedule: Literal["constant", "linear"] = "constant"
    """`linear`: eta grows from eta/max_steps in the first step to eta in the last."""
    standardize: bool = False
    """Replace the difference D by (D - mean) / std over the run so far."""


class EnergyPenalty(Term[EnergyPenaltyConfig]):
    """Responses whose energy loss is far from the reference's get less."""

    metric = "reward/energy_penalty"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config = self.config
        if config.eta == 0:
            return reward
        if inputs.policy_energy is None or inputs.reference_energy is None:
            raise ValueError(f"policy_energy, reference_energy: needed for the energy penalty (eta = {config.eta})")
        difference = energy_difference(inputs.policy_energy.double(), inputs.reference_energy.double(), config.sided)
        if config.standardize:
            self.statistics.update(difference)
            difference = (difference - self.statistics.mean) / (self.statistics.std + 1e-8)
        eta = config.eta * (inputs.step / inputs.max_steps if config.schedule == "linear" else 1.0)
        penalised = reward - eta * difference
        return penalised if config.floor_ratio is None else apply_floor(reward, penalised, config.floor_ratio)


class ClipConfig(Config):
    """The last bound on the reward of a response."""

    range: float | None = Field(default=5.0, gt=0)
    """Clip to +-range; None: no clipping."""


class Clip(Term[ClipConfig]):
    """Rewards stay in a range."""

    metric = "reward/clip"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        return reward if self.config.range is None else reward.clamp(-self.config.range, self.config.range)
