"""The base class of a term of the shaped reward: a function of the inputs and of the reward before it."""

import math
from typing import Any, Generic

from torch import Tensor

from nemo_eppo.config import Config, ConfigT
from nemo_eppo.rewards.inputs import RewardInputs


class RunningStatistics:
    """Mean and standard deviation (population) of all numbers taken in so far (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squares = 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def update(self, x: Tensor) -> None:
        """Take in the numbers `x` [n], of a global batch: every rank then has the same statistics."""
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
    """One term of the reward. Its `statistics` are saved and resumed with the run.

    A built-in term has a file of its own in this room and is entered in `shaping.py`; a user's own is named in
    `shaping.terms` (see `user_terms.py`).
    """

    config_class: type[Any] = Config
    """The class of the term's settings; Config itself has none."""
    needs: tuple[str, ...] = ()
    """Names of the optional fields of RewardInputs that the term reads if it is active."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config
        self.statistics = RunningStatistics()

    @property
    def is_active(self) -> bool:
        """Whether the settings switch the term on; otherwise it is not called."""
        return True

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        """Return the reward after this term, fp64 [B]; `reward` is the one before it, fp64 [B]."""
        raise NotImplementedError
