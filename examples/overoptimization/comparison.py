"""Compares methods that train a policy against a reward model which can be over-optimised, over several reward models.

Methods are compared on the same reward-model seeds, so that differences are paired.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nemo_eppo.evaluation.best_of_n import fit_gao
from nemo_eppo.evaluation.intervals import Floats
from nemo_eppo.observability.metrics import FILE_NAME, read_metrics
from nemo_eppo.observability.recorder import read_rows, recorded_steps


@dataclass(frozen=True)
class Curves:
    """How a run went, at the steps with a validation; all arrays are as long as `steps`."""

    steps: tuple[int, ...]
    proxy: Floats
    """Mean proxy reward of the validation prompts, standardised."""
    gold: Floats
    kl: Floats
    """Mean KL divergence of the step's rollout from the SFT model, in nats; 0 before the first step."""
    energy: Floats
    """Mean energy loss."""
    length: Floats
    """Mean response length in tokens."""
    correlation: float
    """Pearson correlation of proxy and gold reward over the SFT model's responses."""
    first: Floats
    """Gold reward of the SFT model's response to each validation prompt."""
    last: Floats
    """Gold reward of the last step's response to each."""

    @property
    def peak(self) -> float:
        return float(self.gold.max())

    def at(self, kl: float, values: Floats) -> float:
        """Interpolate a curve where the divergence first reaches `kl`; its last value if it never does."""
        reached = np.maximum.accumulate(self.kl)
        if reached[-1] < kl:
            return float(values[-1])
        after = int(np.argmax(reached >= kl))
        if after == 0:
            return float(values[0])
        share = (kl - reached[after - 1]) / (reached[after] - reached[after - 1])
        return float(values[after - 1] + share * (values[after] - values[after - 1]))


def read_curves(run: Path) -> Curves:
    """Read the run directory of an actor that had validation prompts and a gold reward."""
    metrics = read_metrics(run / FILE_NAME)
    steps, gold = metrics["validation/gold_reward"]
    kl = dict(zip(*metrics["kl/policy_reference"], strict=True))
    files = recorded_steps(run / "validation")
    first, last = (read_rows(files[step]) for step in (steps[0], steps[-1]))
    columns = ([row[name] for row in first] for name in ("proxy_reward", "gold_reward"))
    return Curves(
        steps=tuple(steps),
        proxy=np.array(metrics["validation/proxy_reward"][1]),
        gold=np.array(gold),
        kl=np.array([kl[step] if step else 0.0 for step in steps]),
        energy=np.array(metrics["validation/energy_loss"][1]),
        length=np.array(metrics["validation/response_length"][1]),
        correlation=statistics.correlation(*columns),
        first=np.array([row["gold_reward"] for row in first]),
        last=np.array([row["gold_reward"] for row in last]),
    )


@dataclass(frozen=True)
class Acceptance:
    """Conditions on the run of plain PPO under which a reward-model seed counts."""

    correlation: float = 0.5
    """Least correlation of proxy and gold reward over the SFT model's responses."""
    rise: float = 0.15
    """Least rise of the gold reward from the start to its peak."""
    fall: float = 0.05
    """Least fall from the peak to the last step."""

    def refusal(self, ppo: Curves) -> str:
        """Return the reason if a seed does not count, an empty text if it does."""
        if ppo.correlation < self.correlation:
            return f"correlation {ppo.correlation:.3f} is below {self.correlation}"
        if (rise := ppo.peak - float(ppo.gold[0])) < self.rise:
            return f"the gold reward rises by {rise:.3f} only, less than {self.rise}"
        if (fall := ppo.peak - float(ppo.gold[-1])) < self.fall:
            return f"the gold reward falls by {fall:.3f} only after its peak, less than {self.fall}"
        return ""


def measures(runs: Sequence[Curves], ppo: Sequence[Curves]) -> dict[str, list[float]]:
    """Return the measures of a method, on each seed; `ppo` are plain PPO's runs on the same seeds.

    `final` is the primary measure. `equal_kl` is the gold reward where the method's KL divergence reaches that of plain
    PPO at its peak; if it never does (`reaches_equal_kl` is 0), the gold reward at the last step.
    """
    peak_kl = [float(plain.kl[plain.gold.argmax()]) for plain in ppo]
    return {
        "final": [float(run.gold[-1]) for run in runs],
        "peak": [run.peak for run in runs],
        "equal_kl": [run.at(kl, run.gold) for run, kl in zip(runs, peak_kl, strict=True)],
        "reaches_equal_kl": [float(run.kl.max() >= kl) for run, kl in zip(runs, peak_kl, strict=True)],
        "wins_over_sft": [win_rate(run.last, run.first) for run in runs],
        "final_kl": [float(run.kl[-1]) for run in runs],
        "final_proxy": [float(run.proxy[-1]) for run in runs],
        "energy_rise": [float(run.energy[-1] - run.energy[0]) for run in runs],
        "final_length": [float(run.length[-1]) for run in runs],
    }


def over_distance(runs: Sequence[Curves], name: str, points: int = 9) -> tuple[Floats, Floats]:
    """Return the rewards `name`, gold or proxy, at the same distances from the SFT model.

    Returns:
        distances d = sqrt(KL) [points], from 0 to the largest that all runs reach; rewards [runs, points].
    """
    d = np.linspace(0, math.sqrt(max(0.0, min(run.kl.max() for run in runs))), points)
    return d, np.array([[run.at(place**2, getattr(run, name)) for place in d] for run in runs])


def _fit(runs: Sequence[Curves]) -> dict[str, Any] | None:
    """Fit `d (a - b log d)` (Gao et al. 2023, arXiv 2210.10760); None for one run, or runs that have not moved."""
    d, gold = over_distance(runs, "gold")
    return asdict(fit_gao("rl", d, gold)) if d[-1] > 0 and len(runs) > 1 else None


def win_rate(gold: Floats, against: Floats) -> float:
    """Return the share of the prompts on which the gold reward is higher than `against`; equal ones count half."""
    return float((gold > against).mean() + 0.5 * (gold == against).mean())


def over_seeds(values: ArrayLike) -> dict[str, float | None]:
    """Return the mean over seeds and Student's 95% interval, None for one seed. (A bootstrap over so few values covers
    too seldom: .86 of the time with six normal values, .91 with ten.)"""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return {"value": mean, "low": None, "high": None}
    half = half_interval(sample)
    return {"value": mean, "low": mean - half, "high": mean + half}


def half_interval(values: ArrayLike) -> float:
    """Return half the width of Student's 95% interval of the mean of two or more values [seeds]."""
    sample = np.asarray(values, dtype=np.float64)
    return float(stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / math.sqrt(len(sample)))


def paired(values: ArrayLike, others: ArrayLike) -> dict[str, float | None]:
    """Return `over_seeds` of the differences, the number of seeds on which `values` is higher, and the p-value of
    Wilcoxon's signed-rank test, which a single seed with a large difference does not sway."""
    difference = np.subtract(values, others)
    p = float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
    return {**over_seeds(difference), "higher": float((difference > 0).sum()), "p": p}


def compare(runs: Mapping[str, Mapping[int, Curves]], references: Sequence[str]) -> dict[str, Any]:
    """Compare methods over the seeds that all of them have.

    Args:
        runs: curves by method and seed; "ppo" is one of the methods.
        references: methods that all others are compared with, paired by seed.

    Returns:
        for each method its measures: mean with interval, the values of the seeds, and the result of `paired` with each
        reference; and for each method a fit of its gold reward over the distance (`GaoFit`).
    """
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())))
    ordered = {method: [by_seed[seed] for seed in seeds] for method, by_seed in runs.items()}
    measured = {method: measures(curves, ordered["ppo"]) for method, curves in ordered.items()}
    for method, curves in ordered.items():
        for name in references:
            pairs = zip(curves, ordered[name], strict=True)
            measured[method][f"wins_over_{name}"] = [win_rate(run.last, other.last) for run, other in pairs]
    return {
        "seeds": seeds,
        "fits": {method: _fit(curves) for method, curves in ordered.items()},
        "methods": {
            method: {
                measure: {
                    **over_seeds(values),
                    "seeds": values,
                    "less": {
                        name: paired(values, measured[name][measure])
                        for name in references
                        if name != method and measure in measured[name]
                    },
                }
                for measure, values in by_measure.items()
            }
            for method, by_measure in measured.items()
        },
    }
