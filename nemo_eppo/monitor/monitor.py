"""The hacking monitor: watches every PPO step for signs of reward hacking and says what to do about them."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_eppo.config import ConfigError, load_subclass
from nemo_eppo.models.checkpoint_files import pack_array, unpack_array
from nemo_eppo.monitor.indicators import (
    ClusterSeparation,
    Disagreement,
    EnergyRise,
    Indicator,
    LengthDrift,
    Outliers,
    SFTLatents,
)
from nemo_eppo.settings.monitor import Action, MonitorConfig, UserIndicatorConfig


class Alarm(NamedTuple):
    """Says that an indicator was above its threshold for `patience` steps."""

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
    """The metrics and alarms that the monitor gives for one step."""

    metrics: dict[str, float]
    alarms: list[Alarm]


class HackingMonitor:
    """Learns what is normal in this run and raises alarms; the same observations give the same alarms on every rank.

    Raises:
        ConfigError: an indicator of the user's cannot be loaded.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self.indicators = _indicators(config)
        self._need_latents = [indicator for indicator in self.indicators if indicator.needs_latents]
        self.sft = SFTLatents(config.sft_latents)
        self._streaks = dict.fromkeys((indicator.name for indicator in self.indicators), 0)

    def check_latents(self, size: int) -> None:
        """ConfigError if an indicator needs latents and their width over all reward models, `size`, is 0."""
        if self._need_latents and not size:
            first = self._need_latents[0]
            raise ConfigError(
                f"monitor.{first.name}.action = '{first.config.action}' needs latents, but none of rewards gives any: "
                "expected a reward model of kind 'inform'"
            )

    def observe_sft(self, energy: float) -> None:
        """Take in the SFT model's mean energy loss on its own responses, measured before the first step."""
        for indicator in self.indicators:
            if isinstance(indicator, EnergyRise):
                indicator.state["sft"] = energy

    def observe(self, step: int, metrics: Mapping[str, float], latents: Tensor | None = None) -> Watched:
        """Take in one step of the run.

        Args:
            step: number of the step.
            metrics: the step's metrics, by their names in metrics.jsonl.
            latents: [B, d] latents of the responses under the reward models; None if they have none.

        Raises:
            KeyError: a metric that an indicator needs is missing.
            ValueError: no Gaussian can be fitted to the latents.
        """
        if not self._need_latents:
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
        """Return the KL coefficient after an alarm; it never falls."""
        return max(coefficient, min(coefficient * self.config.kl_factor, self.config.kl_max))

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, which JSON stores without loss."""
        state = {
            "indicators": {indicator.name: indicator.state for indicator in self.indicators},
            "streaks": self._streaks,
            "sft_latents": pack_array(self.sft.latents.numpy()),
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken; an indicator that was off then starts now."""
        state = copy.deepcopy(state)
        for indicator in self.indicators:
            indicator.state = state["indicators"].get(indicator.name, {})
            self._streaks[indicator.name] = state["streaks"].get(indicator.name, 0)
        self.sft = SFTLatents(self.config.sft_latents)  # new: the old one caches a Gaussian and a radius
        self.sft.latents = torch.from_numpy(unpack_array(state["sft_latents"]))


def _indicators(config: MonitorConfig) -> list[Indicator[Any]]:
    """Return new indicators, without state, for all that have an action."""
    warmup = config.warmup_steps
    every: list[Indicator[Any]] = [
        EnergyRise(config.energy, warmup),
        LengthDrift(config.length, warmup),
        Outliers(config.outliers, warmup),
        ClusterSeparation(config.csi, warmup),
        Disagreement(config.disagreement, warmup),
        *(_user_indicator(own, warmup) for own in config.indicators),
    ]
    return [indicator for indicator in every if indicator.config.action != "none"]


def _user_indicator(config: UserIndicatorConfig, warmup_steps: int) -> Indicator[UserIndicatorConfig]:
    kind = load_subclass(f"monitor.indicators.{config.name}.indicator", config.indicator, Indicator)
    indicator = kind(config, warmup_steps)
    indicator.name = config.name
    return indicator
