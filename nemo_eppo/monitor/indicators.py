"""Indicators of reward hacking: each turns a PPO step into one number; the higher, the more suspicious."""

from collections.abc import Mapping
from functools import cached_property
from statistics import fmean, stdev, variance
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from nemo_eppo.algorithms.latents import Gaussian, fit_gaussian, outlier_fraction
from nemo_eppo.config import ConfigT
from nemo_eppo.settings.monitor import DisagreementConfig, IndicatorConfig, OutliersConfig

NEIGHBOURS = 5
"""Number of latents that make a neighbourhood dense, for DBSCAN (its authors recommend at least 3)."""


class Indicator(Generic[ConfigT]):
    """Turns what is observed in one step into a number. `state` holds plain containers and is saved with the run."""

    name: str
    needs_latents: ClassVar[bool] = False
    """Whether it can only be used with reward models that have latents."""

    def __init__(self, config: ConfigT, warmup_steps: int) -> None:
        self.config, self.warmup_steps = config, warmup_steps
        self.state: dict[str, Any] = {}

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        """Return the step's number; None while there are too few steps to compare with.

        Args:
            metrics: the step's metrics, by their names in metrics.jsonl.
            latents: [B, d] latents of the step's responses; None without latents, and while `sft` is not complete.
            sft: latents of the SFT model, complete if `latents` is given.
        """
        raise NotImplementedError

    def _deviations(self, value: float, least_std: float, centre: float | None = None) -> float | None:
        """Return by how many running standard deviations `value` is above `centre`, by default the first steps' mean.

        It is None during the first steps. The deviation counts as `least_std` at least, so that a quantity that hardly
        moved at first raises no alarm.
        """
        first: list[float] = self.state.setdefault("first", [])
        if len(first) < self.warmup_steps:
            first.append(value)
            return None
        return (value - (fmean(first) if centre is None else centre)) / max(stdev(first), least_std)


class EnergyRise(Indicator[IndicatorConfig]):
    """Rise of the policy's mean energy loss over the SFT model's, in running standard deviations (arXiv 2501.19358).

    If the run reports energy/reference, that is the SFT model's, and the difference is compared with the first steps'.
    Otherwise it is the energy loss of the validation before the first step or, without one, of the first steps.
    """

    name = "energy"

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        policy = metrics["energy/policy"]
        least_std = 1e-3 * abs(policy)
        if "energy/reference" in metrics:
            return self._deviations(policy - metrics["energy/reference"], least_std)
        return self._deviations(policy, least_std, centre=self.state.get("sft"))


class LengthDrift(Indicator[IndicatorConfig]):
    """Change of the mean response length from the first steps, up or down, in running standard deviations."""

    name = "length"

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        length = metrics["rollout/response_length"]
        deviations = self._deviations(length, least_std=0.01 * length)
        return None if deviations is None else abs(deviations)


class Outliers(Indicator[OutliersConfig]):
    """Fraction of the responses whose latents are outliers under the SFT model's Gaussian (MOP)."""

    name = "outliers"
    needs_latents = True

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        return None if latents is None else outlier_fraction(latents, sft.gaussian, self.config.alpha)


class ClusterSeparation(Indicator[IndicatorConfig]):
    """Cluster separation index in running standard deviations; the first steps follow the collection of SFT latents."""

    name = "csi"
    needs_latents = True

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        if latents is None:
            return None
        index = cluster_separation_index(latents, sft.latents, sft.radius)
        return self._deviations(index, least_std=0.01 * len(latents) * sft.radius)


class Disagreement(Indicator[DisagreementConfig]):
    """The smaller of two Welch t statistics, for the rise of the proxy reward and for the fall of the other reward."""

    name = "disagreement"

    def value(self, metrics: Mapping[str, float], latents: Tensor | None, sft: "SFTLatents") -> float | None:
        window: list[list[float]] = self.state.setdefault("window", [])
        window.append([metrics["reward/proxy"], metrics[f"reward/{self.config.against}"]])
        del window[: -self.config.window]
        if len(window) < self.config.window:
            return None
        proxy, other = zip(*window, strict=True)
        return min(_rise(proxy), -_rise(other))


def _rise(values: tuple[float, ...]) -> float:
    """Return the mean of the second half less the mean of the first, in standard errors."""
    half = len(values) // 2
    first, second = values[:half], values[half:]
    error = (variance(first) / len(first) + variance(second) / len(second)) ** 0.5
    return (fmean(second) - fmean(first)) / (error + 1e-12)  # values that do not move at all are no rise


class SFTLatents:
    """Latents of the first `samples` responses of the run, which represent the SFT model."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.latents = torch.empty(0, 0)
        """fp32 [n, d]."""

    @property
    def complete(self) -> bool:
        return len(self.latents) >= self.samples

    def add(self, latents: Tensor) -> None:
        """Add the latents [B, d] of a step, as many as are still missing."""
        wanted = latents[: self.samples - len(self.latents)].float().cpu()
        self.latents = torch.cat([self.latents, wanted]) if len(self.latents) else wanted

    @cached_property
    def gaussian(self) -> Gaussian:
        return fit_gaussian(self.latents)

    @cached_property
    def radius(self) -> float:
        """The distance within which 95% of the latents have NEIGHBOURS others."""
        distances = torch.cdist(self.latents.double(), self.latents.double())
        return float(distances.kthvalue(NEIGHBOURS + 1, dim=1).values.quantile(0.95))


def cluster_separation_index(latents: Tensor, sft: Tensor, radius: float) -> float:
    """Return CSI, `sum_i |C_i| d_i` over the clusters C_i of the policy's latents (InfoRM, arXiv 2402.09345).

    d_i is the distance of a cluster's centroid to the nearest latent of the SFT model. DBSCAN finds the clusters;
    latents outside them do not count.

    Args:
        latents: [B, d] latents of the policy's responses.
        sft: [N, d] latents of the SFT model.
        radius: radius of a neighbourhood, DBSCAN's eps.
    """
    from sklearn.cluster import DBSCAN  # a second of import

    points = latents.double().cpu()
    labels = torch.from_numpy(DBSCAN(eps=radius, min_samples=NEIGHBOURS).fit_predict(points.numpy()))
    total = 0.0
    for label in labels[labels >= 0].unique():
        members = points[labels == label]
        total += len(members) * float((sft.double().cpu() - members.mean(dim=0)).norm(dim=1).min())
    return total
