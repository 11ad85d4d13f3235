"""The energy-loss penalty that makes PPO into EPPO (arXiv 2501.19358): `r - eta * |dE_SFT - dE_RLHF|`."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from nemo_eppo.algorithms.energy import Sided, apply_floor, energy_difference
from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class EnergyPenaltyConfig(Config):
    """Penalty for a response whose energy loss is far from the SFT model's (EPPO, arXiv 2501.19358)."""

    eta: float = Field(default=0.0, ge=0)
    """Weight of the penalty (the authors': 2.0); 0: no penalty, and energies are only reported."""
    sided: Sided = "both"
    """`both` punishes any difference D of the two, `rise` only an energy loss above the reference's."""
    floor_ratio: float | None = Field(default=None, ge=0)
    """c: the penalty takes at most `c * |r|` from a reward r; null: no limit."""
    schedule: Literal["constant", "linear"] = "constant"
    """`constant`: eta stays; `linear`: it grows from eta/max_steps in the first step to eta in the last."""
    standardize: bool = False
    """Whether D is replaced by (D - mean) / std, with mean and std of all D of the run so far."""


class EnergyPenalty(Term[EnergyPenaltyConfig]):
    """Subtracts `eta * D`, D the distance of the response's energy loss from the reference's."""

    config_class = EnergyPenaltyConfig
    needs = ("ref_energies",)

    @property
    def is_active(self) -> bool:
        return self.config.eta > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config = self.config
        assert inputs.ref_energies is not None
        difference = energy_difference(inputs.energies.double(), inputs.ref_energies.double(), config.sided)
        if config.standardize:
            self.statistics.update(difference)
            difference = (difference - self.statistics.mean) / (self.statistics.std + 1e-8)
        eta = config.eta * (inputs.step / inputs.max_steps if config.schedule == "linear" else 1.0)
        penalised = reward - eta * difference
        return penalised if config.floor_ratio is None else apply_floor(reward, penalised, config.floor_ratio)
