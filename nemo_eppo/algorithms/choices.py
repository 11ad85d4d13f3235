"""The names of this room's options, and the sampling distribution. Settings use them, so nothing here needs torch."""

from typing import Literal, NamedTuple

Aggregation = Literal["token", "sequence", "fixed"]
"""How the losses of tokens are averaged, see `aggregate`."""
Combine = Literal["single", "sum", "mean", "wco", "uwo"]
DivergenceKind = Literal["none", "kl", "chi2", "sqrt_chi2"]
EnergyWindow = Literal["response", "generating"]
"""Which hidden states belong to a response: those *at* its tokens (`response`), or those that *produced* its tokens,
one position earlier (`generating`)."""
EstimatorName = Literal["gae", "grpo", "rloo", "reinforce_plus_plus", "remax"]
KLEstimator = Literal["k1", "k2", "k3"]
KLMode = Literal["paper_sum", "official_mean_first"]
Needs = Literal["critic", "greedy", "group", "nothing"]
ScoreReduction = Literal["last", "sum", "mean"]
Sided = Literal["both", "rise"]

ESTIMATOR_NEEDS: dict[EstimatorName, Needs] = {
    "gae": "critic",
    "grpo": "group",
    "rloo": "group",
    "reinforce_plus_plus": "nothing",
    "remax": "greedy",
}
"""What an estimator of advantages needs beside the rewards, see `advantages.py`."""
ESTIMATOR_SETTINGS: dict[EstimatorName, tuple[str, ...]] = {
    "gae": ("gamma", "lam", "whiten", "bootstrap_truncated"),
    "grpo": ("normalize_std",),
    "rloo": (),
    "reinforce_plus_plus": ("gamma",),
    "remax": (),
}
"""The fields of each estimator's class."""


class Distribution(NamedTuple):
    """The distribution that tokens are sampled from and that log-probabilities refer to."""

    temperature: float
    """The logits are divided by it."""
    top_k: int
    """Only the k likeliest tokens are kept; 0 keeps all."""
    top_p: float
    """Of these, the likeliest that hold this share of the probability; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Applied first, to the logits of tokens in prompt and response so far, see `repetition_slopes`; 1: no penalty."""
    min_new_tokens: int = 0
    """This many first tokens of a response are not in `ending`."""
    ending: tuple[int, ...] = ()
    """Token ids that end a response."""

    @property
    def looks_back(self) -> bool:
        """Whether it depends on earlier tokens, not on the logits alone."""
        return self.repetition_penalty != 1.0 or self.min_new_tokens > 0


UNCHANGED = Distribution(temperature=1.0, top_k=0, top_p=1.0)
"""The model's own distribution."""
