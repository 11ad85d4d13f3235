"""Penalty for long responses, in three forms."""

from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import LengthPenaltyConfig


class LengthPenalty(Term[LengthPenaltyConfig]):
    """Penalises long responses by the formula of `LengthPenaltyConfig.kind`."""

    config_class = LengthPenaltyConfig

    @property
    def is_active(self) -> bool:
        return self.config.kind != "none"

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        config, lengths = self.config, inputs.response_lengths.to(reward)
        assert config.length is not None
        if config.kind == "authors":
            self.statistics.update(reward)
            return reward + config.coefficient * (1 - lengths / config.length) * self.statistics.std
        if config.kind == "linear":
            return reward - config.coefficient * (lengths - config.length).clamp(min=0)
        buffer = float(config.buffer or 0)
        return reward - config.coefficient * (lengths - config.length + buffer).clamp(0, buffer) / buffer
