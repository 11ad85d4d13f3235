"""Where a curve of a run is highest, and whether it falls afterwards by more than it fluctuates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from nemo_eppo.observability.charts import running_mean

_LEVEL = 0.025  # significance level: the probability of reporting a fall in pure noise is lower


class Peak(NamedTuple):
    """The highest point of a curve's running mean, and the fall after it."""

    place: int
    """Index into the values."""
    fall: float
    """The mean of the window around the peak minus that of the last window; windows are those of the running mean."""
    fell: bool
    """Whether the fall is beyond noise."""


def find_peak(values: Sequence[float] | NDArray[np.float64]) -> Peak:
    """Find the peak of a curve, one value for each step.

    The noise is estimated from the differences of successive steps (von Neumann 1941), which slow changes of the curve
    hardly raise. The peak is the highest of many windows, so the limit is Bonferroni's, for three times the number of
    windows that do not overlap.

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
    freedom = 2 * (len(curve) - 1) / 3  # degrees of freedom of this variance, for long curves
    windows = 3 * len(curve) / size  # with len / size, noise would fall up to twice as often as _LEVEL: windows overlap
    limit = t.isf(_LEVEL / windows, freedom) * np.sqrt(variance * (1 / len(high) + 1 / len(low)))
    return Peak(top, fall, bool(fall > limit))


def peak_window(steps: int) -> int:
    """Return the window, in steps, of the running mean whose peak is looked for: a tenth of all steps, odd."""
    return max(steps // 10, 1) | 1
