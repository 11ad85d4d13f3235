"""The energy-loss penalty that makes PPO into EPPO (arXiv 2501.19358): `r - eta * |dE_SFT - dE_RLHF|`."""

from torch import Tensor

from nemo_eppo.algorithms.energy import apply_floor, energy_difference
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import EnergyPenaltyConfig


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
