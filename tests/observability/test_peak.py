"""Peaks of curves that rise, fall or only fluctuate, and what the report says of them."""

import numpy as np
import pytest

from nemo_eppo.observability.charts import running_mean
from nemo_eppo.observability.peak import find_peak, peak_window
from nemo_eppo.observability.report import _verdict


def test_the_peak_and_its_fall_are_those_of_brute_force() -> None:
    values = np.random.default_rng(0).normal(size=57) + np.minimum(np.arange(57), 90 - 2 * np.arange(57)) / 5
    means = [values[max(step - 2, 0) : step + 3].mean() for step in range(57)]
    assert running_mean(values, peak_window(len(values))) == pytest.approx(means)
    found = find_peak(values)
    assert found.place == int(np.argmax(means))
    assert found.fall == pytest.approx(max(means) - values[-5:].mean())
    assert found.fell
    assert not find_peak(values[:2]).fell


@pytest.mark.parametrize("steps", [5, 30, 200])
def test_a_curve_that_only_fluctuates_or_rises_does_not_fall(steps: int) -> None:
    draw = np.random.default_rng(1)
    noise = draw.normal(size=(400, steps))
    assert np.mean([find_peak(curve).fell for curve in noise]) < 0.04, "two standard errors: one in six to one in three"
    assert not any(find_peak(curve + np.linspace(0, 20, steps)).fell for curve in noise)


@pytest.mark.parametrize("steps", [50, 200])
def test_noise_falls_no_more_often_than_at_the_stated_level(steps: int) -> None:
    noise = np.random.default_rng(3).normal(size=(4000, steps))
    assert np.mean([find_peak(curve).fell for curve in noise]) < 0.03


def test_the_report_sees_a_fall_after_a_rise() -> None:
    """The last gold reward is above the first, but far below the highest."""
    noise = np.random.default_rng(2).normal(size=(2, 60)) / 20
    gold = np.interp(np.arange(60), [0, 30, 59], [0.0, 1.0, 0.4]) + noise[0]
    rows = [({"proxy_reward": 0.0, "gold_reward": 0.0, "energy_loss": 0.0}, {"proxy_reward": 2.0 + one,
             "gold_reward": 0.4 + one, "energy_loss": one}) for one in noise[1].tolist()]  # fmt: skip
    steps = list(range(1, 61))
    text = _verdict(rows, {"reward/gold": (steps, gold.tolist())})
    peak = find_peak(gold)
    said = f"gold reward rose over all, but fell by {peak.fall:.2g} from its peak at step {peak.place + 1}, the mark of"
    assert text.startswith(f"Proxy reward rose, {said} over-optimisation.")
    risen = _verdict(rows, {"reward/gold": (steps, (np.linspace(0, 1, 60) + noise[0]).tolist())})
    assert risen.startswith("Proxy reward rose, gold reward rose. The energy loss")
    assert _verdict(rows, {}) == risen
