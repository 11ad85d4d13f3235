"""Where a curve of a run is highest, and whether it falls afterwards by more than it fluctuates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from nemo_eppo.observability.charts import running_mean

_LEVEL = 0.025  # highest probability that a curve which only fluctuates is said to fall


class Peak(NamedTuple):
    """The highest place of a curve's running mean, and what comes after it."""

    place: int
    """Of the values, from 0."""
    fall: float
    """From the mean around the peak to the mean at the end; their windows are those of the running mean."""
    fell: bool
    """Whether the fall is beyond noise."""


def find_peak(values: Sequence[float] | NDArray[np.float64]) -> Peak:
    """Find the peak of a curve, one value for each step.

    The noise of a step is that of the differences of successive steps (von Neumann 1941), which slow changes hardly
    raise. By noise alone, the peak is the highest of many windows: Bonferroni's limit for three times as many as do not
    overlap.

    Args:
        values: [steps], at least one.
    """
    curve, size = np.asarray(values, dtype=np.float64), peak_window(len(values))
    top = int(running_mean(curve, size).argmax())
    high, low = curve[max(top - size // 2, 0) : top + size // 2 + 1], curve[-size:]
    fall = float(high.mean() - low.mean())
    if len(curve) < 3 or top + size // 2 >= len(curve) - size:  # the windows share steps
        return Peak(top, fall, False)
    variance = np.square(np.diff(curve)).mean() / 2
    freedom = 2 * (len(curve) - 1) / 3  # of this estimate of a variance, for long curves
    windows = 3 * len(curve) / size  # windows slide: of noise, len / size alone fall up to twice as often as _LEVEL
    limit = t.isf(_LEVEL / windows, freedom) * np.sqrt(variance * (1 / len(high) + 1 / len(low)))
    return Peak(top, fall, bool(fall > limit))


def peak_window(steps: int) -> int:
    """Return how many steps a running mean takes in which a peak is looked for: a tenth of all, an odd number."""
    return max(steps // 10, 1) | 1
