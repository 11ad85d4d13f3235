"""Indicators of reward hacking, and the actions that their alarms cause."""

from typing import Literal

from pydantic import Field, model_validator

from nemo_eppo.config import Config

Action = Literal["none", "log", "raise_kl", "stop"]


class IndicatorConfig(Config):
    """One indicator. A "running standard deviation" is that of its values in the first `warmup_steps` steps."""

    action: Action = "none"
    """What an alarm does. `none`: nothing, the indicator is not computed; `log`: log a warning and set
    monitor/<indicator>/alarm to 1; `raise_kl`: also raise the KL coefficient; `stop`: also save a checkpoint and end
    the run, which resumes if it is started again."""
    threshold: float = Field(5.0, gt=0)
    """An alarm needs values above this."""
    patience: int = Field(3, ge=1)
    """Number of consecutive steps with such a value that raise an alarm. After an alarm the count starts again."""


class OutliersConfig(IndicatorConfig):
    """Fraction of responses whose latents are outliers among the SFT model's (MOP). Needs latents."""

    threshold: float = Field(0.2, gt=0, lt=1)
    """An alarm needs a larger fraction than this."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """A latent is an outlier if its chi-squared p-value is below this."""


class DisagreementConfig(IndicatorConfig):
    """Whether the proxy reward rises while a reward that is not trained on falls."""

    threshold: float = Field(3.0, gt=0)
    """Standard errors that both changes, from the first to the second half of the window, have to exceed."""
    against: Literal["gold", "held_out"] = "gold"
    """The other reward: `gold` is gold_reward, `held_out` is held_out_reward."""
    window: int = Field(20, ge=4)
    """Number of latest steps that are compared."""


class UserIndicatorConfig(IndicatorConfig):
    """One of the user's own indicators, a subclass of `nemo_eppo.monitor.indicators.Indicator`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the indicator; metrics show it as monitor/<name>."""
    indicator: str
    """The class, as "module:Class"."""
    action: Action = "log"
    """What an alarm does, as of other indicators."""


class MonitorConfig(Config):
    """Indicators of reward hacking, reported as monitor/<indicator>, their alarms as monitor/<indicator>/alarm."""

    warmup_steps: int = Field(20, ge=2)
    """Number of first steps from which an indicator learns what is normal; it raises no alarm before."""
    energy: IndicatorConfig = IndicatorConfig(action="log")
    """Rise of the policy's energy loss over the SFT model's, in running standard deviations."""
    length: IndicatorConfig = IndicatorConfig(action="log")
    """Change of the mean response length, up or down, in running standard deviations."""
    outliers: OutliersConfig = OutliersConfig()
    csi: IndicatorConfig = IndicatorConfig()
    """Cluster separation index of InfoRM, in running standard deviations. Needs latents."""
    disagreement: DisagreementConfig = DisagreementConfig()
    indicators: tuple[UserIndicatorConfig, ...] = ()
    """The user's own indicators."""
    sft_latents: int = Field(512, ge=16)
    """Number of first responses whose latents represent the SFT model's, for outliers and csi."""
    kl_factor: float = Field(2.0, gt=1)
    """Factor by which an alarm with action raise_kl multiplies the KL coefficient."""
    kl_max: float = Field(1.0, gt=0)
    """Largest KL coefficient that raise_kl sets."""

    @model_validator(mode="after")
    def _names_are_free(self) -> "MonitorConfig":
        names = [*self._built_in, *(own.name for own in self.indicators)]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"indicators: the name {twice[0]} is taken")
        return self

    @property
    def _built_in(self) -> dict[str, IndicatorConfig]:
        return {name: value for name, value in self if isinstance(value, IndicatorConfig)}

    @property
    def active(self) -> dict[str, IndicatorConfig]:
        """Indicators that have an action, by name."""
        every = self._built_in | {own.name: own for own in self.indicators}
        return {name: indicator for name, indicator in every.items() if indicator.action != "none"}

    @property
    def may_stop(self) -> bool:
        """Whether an alarm of any indicator ends the run."""
        return any(indicator.action == "stop" for indicator in self.active.values())

    @property
    def raises_kl(self) -> list[str]:
        """Names of the indicators whose action is raise_kl."""
        return [name for name, indicator in self.active.items() if indicator.action == "raise_kl"]
