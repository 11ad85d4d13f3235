"""How responses are sampled."""

from pydantic import Field, model_validator

from nemo_eppo.algorithms.sampling import Distribution
from nemo_eppo.config import Config


class SamplingParams(Config):
    """Settings of the generation engine; the trainer's log-probs follow them."""

    max_new_tokens: int = Field(gt=0)
    """Longest response, EOS included; a response that reaches it without EOS is truncated."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits."""
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0: among all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that hold this share of the probability; 1: among all."""
    greedy: bool = False
    """Always take the likeliest token."""

    @property
    def distribution(self) -> Distribution:
        """What a response's tokens are sampled from, unless it is greedy."""
        return Distribution(self.temperature, self.top_k, self.top_p)

    @model_validator(mode="after")
    def _greedy_samples_nothing(self) -> "SamplingParams":
        if self.greedy and (self.top_k, self.top_p) != (0, 1.0):
            raise ValueError("greedy takes the likeliest token; top_k and top_p must be left at 0 and 1")
        return self
