"""The hacking monitor: watches every PPO step for signs of reward hacking, and tells what is to be done about them."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.models.checkpoint_files import pack_array, unpack_array
from nemo_eppo.monitor.indicators import (
    Action,
    ClusterSeparation,
    Disagreement,
    DisagreementConfig,
    EnergyRise,
    Indicator,
    IndicatorConfig,
    LengthDrift,
    Outliers,
    OutliersConfig,
    SFTLatents,
)


class MonitorConfig(Config):
    """What is watched. Every indicator is reported as monitor/<indicator>, its alarms as monitor/<indicator>/alarm."""

    warmup_steps: int = Field(20, ge=2)
    """The first so many steps tell what is normal; no alarm comes from indicators that still gather them."""
    energy: IndicatorConfig = IndicatorConfig(action="log")
    """Rise of the policy's energy loss over the SFT model's, in running standard deviations."""
    length: IndicatorConfig = IndicatorConfig(action="log")
    """Change of the mean response length, either way, in running standard deviations."""
    outliers: OutliersConfig = OutliersConfig()
    csi: IndicatorConfig = IndicatorConfig()
    """Cluster separation index of InfoRM, in running standard deviations. Needs latents."""
    disagreement: DisagreementConfig = DisagreementConfig()
    sft_latents: int = Field(512, ge=16)
    """outliers and csi: the latents of the first so many responses stand for the SFT model's."""
    kl_factor: float = Field(2.0, gt=1)
    """raise_kl: an alarm multiplies the KL coefficient by this ..."""
    kl_max: float = Field(1.0, gt=0)
    """... up to this."""

    @property
    def indicators(self) -> list[Indicator[Any]]:
        """Those with an action, fresh."""
        every: list[Indicator[Any]] = [
            EnergyRise(self.energy, self.warmup_steps),
            LengthDrift(self.length, self.warmup_steps),
            Outliers(self.outliers, self.warmup_steps),
            ClusterSeparation(self.csi, self.warmup_steps),
            Disagreement(self.disagreement, self.warmup_steps),
        ]
        return [indicator for indicator in every if indicator.config.action != "none"]

    @property
    def needs_latents(self) -> list[str]:
        """The indicators with an action that cannot do without latents."""
        return [name for name in ("outliers", "csi") if getattr(self, name).action != "none"]

    @property
    def raises_kl(self) -> list[str]:
        """The indicators whose action is raise_kl."""
        return [indicator.name for indicator in self.indicators if indicator.config.action == "raise_kl"]


class Alarm(NamedTuple):
    """An indicator was above its threshold for long enough."""

    step: int
    indicator: str
    value: float
    threshold: float
    patience: int
    action: Action

    def __str__(self) -> str:
        return (
            f"step {self.step}: signs of reward hacking: monitor/{self.indicator} = {self.value:.3g}, above its "
            f"threshold of {self.threshold:g} for {self.patience} steps; action: {self.action}"
        )


class Watched(NamedTuple):
    """What the monitor makes of one step."""

    metrics: dict[str, float]
    alarms: list[Alarm]


class HackingMonitor:
    """Keeps what is normal for this run and raises alarms. Same observations, same state: same alarms."""

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self.indicators = config.indicators
        self.sft = SFTLatents(config.sft_latents)
        self._streaks = dict.fromkeys((indicator.name for indicator in self.indicators), 0)

    def check_latents(self, size: int) -> None:
        """ConfigError if the reward models' latents, of this width in all, are needed and there are none."""
        if self.config.needs_latents and not size:
            name = self.config.needs_latents[0]
            raise ConfigError(
                f"monitor.{name}.action = '{getattr(self.config, name).action}' needs latents, but none of "
                "rewards gives any: expected a reward model of kind 'inform'"
            )

    def observe_sft(self, energy: float) -> None:
        """Take in the SFT model's mean energy loss on its own sampled responses, from before the first step."""
        for indicator in self.indicators:
            if isinstance(indicator, EnergyRise):
                indicator.state["sft"] = energy

    def observe(self, step: int, metrics: Mapping[str, float], latents: Tensor | None = None) -> Watched:
        """Take in one step of the run.

        Args:
            step: its number.
            metrics: by their names in metrics.jsonl.
            latents: [B, d] of the responses under the reward model.

        Raises:
            KeyError: a metric that an indicator needs is missing.
            ValueError: latents without a Gaussian.
        """
        if not self.config.needs_latents:
            latents = None
        if latents is not None and not self.sft.complete:
            self.sft.add(latents)
            latents = None
        watched = Watched({}, [])
        for indicator in self.indicators:
            value, config, name = indicator.value(metrics, latents, self.sft), indicator.config, indicator.name
            if value is None:
                continue
            self._streaks[name] = self._streaks[name] + 1 if value > config.threshold else 0
            is_alarm = self._streaks[name] == config.patience
            watched.metrics[f"monitor/{name}"] = value
            watched.metrics[f"monitor/{name}/alarm"] = float(is_alarm)
            if is_alarm:
                self._streaks[name] = 0
                watched.alarms.append(Alarm(step, name, value, config.threshold, config.patience, config.action))
        return watched

    def raised_kl(self, coefficient: float) -> float:
        """The KL coefficient after an alarm."""
        return max(coefficient, min(coefficient * self.config.kl_factor, self.config.kl_max))

    def state_dict(self) -> dict[str, Any]:
        """Plain containers; JSON brings every number back as it was."""
        state = {
            "indicators": {indicator.name: indicator.state for indicator in self.indicators},
            "streaks": self._streaks,
            "sft_latents": pack_array(self.sft.latents.numpy()),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; an indicator that was not watched then starts now."""
        state = copy.deepcopy(state)
        for indicator in self.indicators:
            indicator.state = state["indicators"].get(indicator.name, {})
            self._streaks[indicator.name] = state["streaks"].get(indicator.name, 0)
        self.sft.latents = torch.from_numpy(unpack_array(state["sft_latents"]))
