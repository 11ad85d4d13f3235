"""Terms of the reward that only the bench uses: controls of the energy penalty, and two of our own."""

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class WeightConfig(Config):
    eta: float = Field(gt=0)
    """Weight of the penalty."""


class PermutedReference(Term[WeightConfig]):
    """The energy penalty against the reference's energy of another prompt: a control without its content."""

    config_class = WeightConfig
    needs = ("ref_energies",)

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.ref_energies is not None
        rise = inputs.energies.double() - inputs.ref_energies.double().roll(1, dims=0)
        return reward - self.config.eta * rise.abs().sum(dim=1)


class WithinBatch(Term[WeightConfig]):
    """The energy penalty on a response's rise minus its batch's mean rise: without the shift that all share."""

    config_class = WeightConfig
    needs = ("ref_energies",)

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.ref_energies is not None
        rise = inputs.energies.double() - inputs.ref_energies.double()
        return reward - self.config.eta * (rise - rise.mean(dim=0)).abs().sum(dim=1)


class FrozenEnergies(Term[WeightConfig]):
    """A penalty on the SFT model's energies of the policy's text: EPPO's without the influence of the policy's weights.

    It needs `energy.reference: same_response`. Its baseline is the mean over the responses of the first step, in which
    the policy still is the SFT model.
    """

    config_class = WeightConfig
    needs = ("ref_energies",)

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.ref_energies is not None
        energies = inputs.ref_energies.double().sum(dim=1)
        if not self.statistics.count:
            self.statistics.update(energies)  # of the first step only
        return reward - self.config.eta * (energies - self.statistics.mean).abs()


class EnergyGatedKL(Term[WeightConfig]):
    """`r - eta * g * KL`: a KL penalty whose weight g grows with the batch's mean energy loss.

    The rise is nearly the same for all responses of a batch, so a penalty that is linear in it is cancelled when
    advantages are whitened. Here it is the weight g of a penalty that differs between responses: the mean rise over
    the reference's energy, in standard deviations of this rise in the first step, at least 0.
    """

    config_class = WeightConfig
    needs = ("ref_energies", "ref_logprobs")

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.ref_energies is not None
        assert inputs.ref_logprobs is not None
        rise = (inputs.energies.double() - inputs.ref_energies.double()).sum(dim=1)
        if not self.statistics.count:
            self.statistics.update(rise)  # of the first step only
        gate = max(0.0, float(rise.mean() - self.statistics.mean) / max(self.statistics.std, 1e-12))
        ratios = torch.where(inputs.mask, inputs.logprobs.double() - inputs.ref_logprobs.double(), 0.0)
        return reward - self.config.eta * gate * ratios.sum(dim=1)


class EnergyAboveRecent(Term[WeightConfig]):
    """`r - eta * max(0, z)^2`, where z is a response's energy loss above a baseline of earlier steps.

    A baseline of each prompt's own energies in earlier steps would be empty here: a run of 60 steps of 64 prompts takes
    3,840 of 12,000, each once; the first would come back at step 188. So the baseline is the reference's energy of the
    prompt plus a running mean of earlier steps' rises over the reference, in which each step has a weight of .1. z is
    in standard deviations of the rise in the first step, which is not punished. A rise that all responses share moves
    every z; since the square is not linear, their differences then weigh more, and whitening cannot cancel it.
    """

    config_class = WeightConfig
    needs = ("ref_energies",)

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        assert inputs.ref_energies is not None
        rise = (inputs.energies.double() - inputs.ref_energies.double()).sum(dim=1)
        if not self.statistics.count:
            self.statistics.update(rise)  # the deviation stays that of the first step
            return reward
        z = (rise - self.statistics.mean) / max(self.statistics.std, 1e-12)
        self.statistics.mean += 0.1 * (rise.mean().item() - self.statistics.mean)
        return reward - self.config.eta * z.clamp(min=0).square()
