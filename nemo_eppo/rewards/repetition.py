"""Less reward for responses that repeat themselves."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config
from nemo_eppo.rewards.inputs import RewardInputs
from nemo_eppo.rewards.term import Term


class RepetitionConfig(Config):
    """`r - coefficient * f`, f the fraction of a response's n-grams of tokens that stood in it before."""

    coefficient: float = Field(default=0.0, ge=0)
    """Weight: what a response that only repeats itself loses; 0: no penalty."""
    ngram: int = Field(default=4, ge=1)
    """Tokens of an n-gram; a shorter response repeats nothing."""


class Repetition(Term[RepetitionConfig]):
    """Repeated n-grams of tokens cost reward."""

    config_class = RepetitionConfig

    @property
    def is_active(self) -> bool:
        return self.config.coefficient > 0

    def __call__(self, inputs: RewardInputs, reward: Tensor) -> Tensor:
        repeated = [repeated_fraction(sample.token_ids, self.config.ngram) for sample in inputs.samples]
        return reward - self.config.coefficient * torch.tensor(repeated).to(reward)


def repeated_fraction(token_ids: Sequence[int], ngram: int) -> float:
    """The fraction of the n-grams of `token_ids` that stand in it before; 0 if there is none of that length."""
    found = [tuple(token_ids[start : start + ngram]) for start in range(len(token_ids) - ngram + 1)]
    return 1 - len(set(found)) / len(found) if found else 0.0
