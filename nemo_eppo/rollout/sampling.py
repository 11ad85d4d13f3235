"""The settings by which responses are sampled."""

from pydantic import Field, model_validator

from nemo_eppo.algorithms.sampling import Distribution
from nemo_eppo.config import Config


class SamplingParams(Config):
    """How the engine samples responses; the trainer computes log-probs under the same distribution."""

    max_new_tokens: int = Field(gt=0)
    """Most tokens of a response, EOS included; a response that reaches it without EOS is truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """The logits are divided by this."""
    top_k: int = Field(default=0, ge=0)
    """Sample only among the k likeliest tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only among the likeliest tokens that together have this share of the probability; 1: among all."""
    greedy: bool = False
    """Whether the likeliest token is always taken, instead of sampling."""

    @property
    def distribution(self) -> Distribution:
        """What a response's tokens are sampled from, unless it is greedy."""
        return Distribution(self.temperature, self.top_k, self.top_p)

    @model_validator(mode="after")
    def _greedy_samples_nothing(self) -> "SamplingParams":
        if self.greedy and (self.top_k, self.top_p) != (0, 1.0):
            raise ValueError("greedy takes the likeliest token; top_k and top_p must be left at 0 and 1")
        return self
