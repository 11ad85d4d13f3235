"""Terms as a user would write them, for the tests of this folder."""

import torch
from pydantic import Field

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class BonusConfig(Config):
    bonus: float = Field(ge=0)


class Bonus(Term[BonusConfig]):
    """A constant, and the running mean of what came before."""

    config_class = BonusConfig

    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        self.statistics.update(reward)
        return reward + self.config.bonus + self.statistics.mean


class Drift(Term[Config]):
    """Less reward the further the policy is from its reference."""

    needs = ("ref_logprobs",)

    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        assert inputs.ref_logprobs is not None
        return reward - (inputs.logprobs - inputs.ref_logprobs).where(inputs.mask, 0).double().sum(1)


class InPlace(Term[Config]):
    """Takes 1 off the very tensor that it was given."""

    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        reward -= 1
        return reward


class WrongShape(Term[Config]):
    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        return reward[:, None]


class Nothing(Term[Config]):
    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        return None  # type: ignore[return-value]


class WholeNumbers(Term[Config]):
    def __call__(self, inputs: RewardInputs, reward: torch.Tensor) -> torch.Tensor:
        return inputs.mask.sum(1)


class Needy(Term[Config]):
    needs = ("logits",)


class NoTerm:
    pass
