"""How scores become the reward of a response: one section for each term, in the order of ShapingConfig."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nemo_eppo.algorithms.choices import Combine, DivergenceKind, KLEstimator, Sided
from nemo_eppo.config import Config


class LatentPenaltyConfig(Config):
    """Penalty on the distance of a response's latents from those of the SFT model (InfoRM, arXiv 2402.09345)."""

    gamma: float = Field(default=0.0, ge=0)
    """Weight of the penalty, per standard deviation; 0: no penalty. Needs a reward model of kind inform."""


class LengthPenaltyConfig(Config):
    """Penalty for long responses."""

    kind: Literal["none", "authors", "linear", "soft_overlong"] = "none"
    """What is added to the reward of a response of `len` tokens. `authors`: `coefficient * (1 - len/length) * sigma`,
    sigma the running standard deviation of the reward; `linear`: `-coefficient * max(0, len - length)`; `soft_overlong`
    (DAPO, arXiv 2503.14476): a ramp from 0 to `-coefficient` over the last `buffer` tokens before `length`."""
    length: int | None = Field(default=None, gt=0)
    """Response tokens at which the penalty starts, or `soft_overlong` is full; null for kind none alone."""
    coefficient: float = Field(default=1.0, gt=0)
    """Weight of the penalty: reward lost per token beyond `length` (`linear`), or at `length` (`soft_overlong`)."""
    buffer: int | None = Field(default=None, gt=0)
    """Width of the ramp of `soft_overlong` in tokens; null for the other kinds."""

    @model_validator(mode="after")
    def _complete(self) -> "LengthPenaltyConfig":
        if self.kind != "none" and self.length is None:
            raise ValueError(f"kind '{self.kind}' needs length")
        if self.kind == "none" and self.length is not None:
            raise ValueError(
                f"length {self.length} without a kind: expected authors, linear or soft_overlong, or no length"
            )
        if self.kind == "soft_overlong" and (self.buffer is None or self.buffer > (self.length or 0)):
            raise ValueError(f"kind 'soft_overlong' needs a buffer of at most length; got {self.buffer}")
        if self.kind != "soft_overlong" and self.buffer is not None:
            raise ValueError(f"buffer {self.buffer} with kind '{self.kind}': only 'soft_overlong' has a buffer")
        return self


class MissingEosConfig(Config):
    """Penalty for a response that was cut off."""

    penalty: float = Field(default=0.0, ge=0)
    """Reward that a response without EOS or a stop string loses; 0: no penalty."""


class RepetitionConfig(Config):
    """Penalty for a response's n-grams of tokens that occurred in it before."""

    coefficient: float = Field(default=0.0, ge=0)
    """Weight of the penalty: reward lost if all n-grams were repetitions; 0: no penalty."""
    ngram: int = Field(default=4, ge=1)
    """n, the tokens of an n-gram; a shorter response has none, and no penalty."""


class ResponseFormatConfig(Config):
    """Rules for the response's text, as regular expressions (Python's `re.search`; `.` matches newlines too)."""

    require: str | None = None
    """Pattern that has to be found, such as `^<think>.*</think>`; null: no such rule."""
    forbid: str | None = None
    """Pattern that must not be found, such as `[\\u4e00-\\u9fff]` to keep Chinese out; null: no such rule."""
    penalty: float = Field(default=0.0, ge=0)
    """Reward lost for each of the two rules that a response breaks; 0: no penalty."""

    @field_validator("require", "forbid")
    @classmethod
    def _is_a_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"expected a regular expression ({error})") from None
        return pattern

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormatConfig":
        has_pattern = self.require is not None or self.forbid is not None
        if has_pattern != (self.penalty > 0):
            raise ValueError(
                f"penalty {self.penalty} with require {self.require!r}, forbid {self.forbid!r}: set a "
                "penalty and at least one pattern, or neither"
            )
        return self


class EnergyPenaltyConfig(Config):
    """Penalty for a response whose energy loss is far from the SFT model's (EPPO, arXiv 2501.19358)."""

    eta: float = Field(default=0.0, ge=0)
    """Weight of the penalty, in the units of energy.preset; 0: no penalty, and energies are only reported."""
    sided: Sided = "both"
    """`both` punishes any difference D of the two, `rise` only an energy loss above the reference's."""
    floor_ratio: float | None = Field(default=None, ge=0)
    """c: the penalty takes at most `c * |r|` from a reward r; null: no limit."""
    schedule: Literal["constant", "linear"] = "constant"
    """`constant`: eta stays; `linear`: it grows from eta/max_steps in the first step to eta in the last."""
    standardize: bool = False
    """Whether D is replaced by (D - mean) / std, with mean and std of all D of the run so far."""


class ClipConfig(Config):
    """Limits on the reward of a response."""

    range: float | None = Field(default=5.0, gt=0)
    """The reward is clipped to [-range, range]; null: no clipping."""


class DivergenceConfig(Config):
    """Chi-squared or KL divergence of whole responses (Correlated Proxies, arXiv 2403.03185)."""

    kind: DivergenceKind = "none"
    """Which divergence is penalised: `none`, `kl`, `chi2`, or `sqrt_chi2`, which the paper's RLHF runs use."""
    coefficient: float = Field(default=0.0, ge=0)
    """Weight of the penalty (the paper's: 8e-4 for sqrt_chi2); 0 if kind is none."""
    placement: Literal["reward", "loss"] = "loss"
    """Whether the penalty is added to the policy's loss or subtracted from the reward. At the policy that sampled, the
    expected gradient in the loss is that of KL(ref||policy) for kl and of chi2(policy||ref)/2 + KL(ref||policy) for
    chi2; in the reward, that of KL(policy||ref) for kl and of chi2(policy||ref)/2 for chi2. For sqrt_chi2 it is chi2's
    divided by 2*sqrt(chi2)."""

    @model_validator(mode="after")
    def _complete(self) -> "DivergenceConfig":
        if (self.kind == "none") != (self.coefficient == 0):
            raise ValueError(f"kind '{self.kind}' with coefficient {self.coefficient}: set both, or neither")
        return self

    @property
    def in_loss(self) -> bool:
        return self.kind != "none" and self.placement == "loss"


class KLPenaltyConfig(Config):
    """Penalty on the distance from the reference policy, per token."""

    coefficient: float = Field(default=0.0, ge=0)
    """beta, the weight of the penalty; with the adaptive controller, its first value. 0: no penalty."""
    estimator: KLEstimator = "k1"
    """How the KL divergence is estimated from a token's log-ratio L: k1 `L`, k2 `L^2 / 2`, k3 `exp(-L) - 1 + L`."""
    placement: Literal["reward", "loss"] = "reward"
    """Whether the penalty is subtracted from each token's reward or added to the policy's loss. k1 cannot be in the
    loss: the expected gradient of L over the policy's own tokens is 0."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """`fixed` keeps beta; `adaptive` steers the mean KL of a response to `target` (Ziegler et al. 2019)."""
    target: float | None = Field(default=None, gt=0)
    """Mean KL to steer to, in nats per response; required by `adaptive`, which alone uses it."""
    horizon: int | None = Field(default=None, gt=0)
    """Number of responses over which beta adapts; required by `adaptive`, which alone uses it."""
    report: bool = True
    """Whether kl/policy_reference is reported even if nothing else needs the reference's log-probs; false then saves a
    forward pass per step."""

    @model_validator(mode="after")
    def _adaptive_is_complete(self) -> "KLPenaltyConfig":
        if self.controller == "adaptive" and (self.target is None or self.horizon is None or self.coefficient == 0):
            raise ValueError("controller 'adaptive' needs target, horizon and a coefficient above 0")
        return self

    @model_validator(mode="after")
    def _has_a_gradient(self) -> "KLPenaltyConfig":
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "placement 'loss' with estimator 'k1' holds nothing back, its expected gradient is 0: expected "
                "estimator k2 or k3"
            )
        return self


class UserTermConfig(Config):
    """One of the user's own terms, a subclass of `nemo_eppo.rewards.term.Term`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the term; ledger and metrics show what it adds as reward/<name>."""
    term: str
    """The class, as "module:Class"."""
    after: str = "energy_penalty"
    """Name of the term that it follows, built-in or the user's own, or `proxy` to be the first. Several that follow the
    same one are applied in the order of this list."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Values of the settings that its `config_class` declares."""


class ShapingConfig(Config):
    """How the scores of a response become its reward: they are combined, then changed by one term after the other."""

    combine: Combine = "single"
    """How the scores of several reward models become one: `single` allows one model only; `sum`; `mean`; `wco` takes
    the lowest; `uwo` takes the mean less uwo_lambda times the variance over models (arXiv 2310.02743). The values of
    reward functions are added to the result."""
    uwo_lambda: float = Field(default=0.1, ge=0)
    """Weight of the variance over models; used by uwo only."""
    uwo_ddof: Literal[0, 1] = 0
    """0: the variance divides by the number of models, 1: by one less; used by uwo only."""
    latent_penalty: LatentPenaltyConfig = LatentPenaltyConfig()
    length_penalty: LengthPenaltyConfig = LengthPenaltyConfig()
    missing_eos: MissingEosConfig = MissingEosConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    response_format: ResponseFormatConfig = ResponseFormatConfig()
    energy_penalty: EnergyPenaltyConfig = EnergyPenaltyConfig()
    clip: ClipConfig = ClipConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    kl: KLPenaltyConfig = KLPenaltyConfig()
    terms: tuple[UserTermConfig, ...] = ()
    """The user's own terms."""

    @model_validator(mode="after")
    def _kl_in_one_place(self) -> "ShapingConfig":
        both = self.kl.coefficient > 0 and self.divergence.kind == "kl"
        if both and self.kl.placement != self.divergence.placement:
            raise ValueError(
                f"kl.placement = '{self.kl.placement}', divergence.placement = '{self.divergence.placement}': they put "
                "the KL divergence into the reward and into the loss at once; expected one place"
            )
        return self
