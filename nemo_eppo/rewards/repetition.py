"""Penalty for responses that repeat themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term
from nemo_eppo.settings.shaping import RepetitionConfig


class Repetition(Term[RepetitionConfig]):
    """Subtracts `coefficient * f`, f the fraction of the response's n-grams that are repetitions."""

    config_class = RepetitionConfig

    @property
    def is_active(self) -> bool:
        return self.config.coefficient > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        repeated = [repeated_fraction(sample.token_ids, self.config.ngram) for sample in inputs.samples]
        return reward - self.config.coefficient * torch.tensor(repeated).to(reward)


def repeated_fraction(token_ids: Sequence[int], ngram: int) -> float:
    """The fraction of the n-grams of `token_ids` that occur earlier in it too; 0 if it is shorter than an n-gram."""
    ngrams = [tuple(token_ids[start : start + ngram]) for start in range(len(token_ids) - ngram + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
