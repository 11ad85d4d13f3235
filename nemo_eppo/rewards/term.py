"""What a term of the shaped reward is: a function of the inputs and of the reward before it."""

import math
from typing import Any, Generic

from torch import Tensor

from nemo_eppo.config import ConfigT
from nemo_eppo.rewards.inputs import RewardInputs


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

    config_class: type[ConfigT]
    """The settings of the term."""
    needs: tuple[str, ...] = ()
    """Names of optional fields of RewardInputs that the term reads while it is at work."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.statistics = RunningStatistics()

    @property
    def is_active(self) -> bool:
        """Whether the settings have the term do anything; one that does nothing is not called."""
        return True

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        """The reward fp64 [B] after this term, from the reward [B] before it."""
        raise NotImplementedError
