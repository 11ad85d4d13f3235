"""Best-of-n selection by a proxy reward, and the over-optimisation curves of Gao et al. (2210.10760).

P prompts have N answers each. d is the square root of a KL divergence in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from nemo_eppo.evaluation.intervals import Floats

FitKind = Literal["best_of_n", "rl"]
_DRAWS = 1_000  # of the bootstrap
_LEVEL = 0.95  # share of the draws inside an interval, and inside the band at each point
_POINTS = 33  # of a curve


def best_of_n(proxy: ArrayLike, scores: ArrayLike, sizes: Sequence[int]) -> Floats:
    """Estimate, without bias, the mean score of the answer that has the highest proxy reward among n.

    With a prompt's answers sorted by proxy, ascending, answer i of N is the best of n for C(i-1, n-1) of the C(N, n)
    subsets (Nakano et al., 2112.09332, appendix I). Among answers of equal proxy reward the choice is random.

    Args:
        proxy: [P, N] rewards that choose.
        scores: [P, N] rewards that are averaged over the chosen answers; `proxy` itself for the proxy's own curve.
        sizes: K values of n, from 1 to N.

    Returns:
        [P, K].
    """
    proxy, scores = np.asarray(proxy, np.float64), np.asarray(scores, np.float64)
    order = proxy.argsort(axis=1, kind="stable")
    ranked, ordered = np.take_along_axis(scores, order, 1), np.take_along_axis(proxy, order, 1)
    tied = np.stack([_mean_of_ties(*rows) for rows in zip(ordered, ranked, strict=True)])
    return tied @ np.stack([_weights(proxy.shape[1], n) for n in sizes], axis=1)


def _mean_of_ties(proxy: Floats, scores: Floats) -> Floats:
    """Replace the scores [N] of answers with equal proxy rewards [N] by their mean."""
    _, group, counts = np.unique(proxy, return_inverse=True, return_counts=True)
    means: Floats = (np.bincount(group, scores) / counts)[group]
    return means


@cache  # the same for every prompt
def _weights(answers: int, n: int) -> Floats:
    """Return C(i-1, n-1) / C(N, n) for i = 1 ... N."""
    below = np.arange(answers, dtype=np.float64)  # i - 1
    weights = np.zeros(answers)
    weights[n - 1 :] = np.exp(_log_choose(below[n - 1 :], n - 1) - _log_choose(np.float64(answers), n))
    return weights


def _log_choose(n: Floats | np.float64, k: int) -> Floats:
    logarithm: Floats = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return logarithm


def best_of_n_kl(n: ArrayLike) -> Floats:
    """Return log n - (n - 1) / n: an upper bound, in nats, of the KL divergence of best-of-n from the policy."""
    n = np.asarray(n, np.float64)
    return np.log(n) - (n - 1) / n


def subset_sizes(answers: int) -> list[int]:
    """Return the n at which curves are drawn: powers of two up to the number of answers, and this number."""
    return sorted({*(2**power for power in range(answers.bit_length())), answers})


@dataclass(frozen=True)
class GaoFit:
    """A fit of a mean score over d, and a band around it from a bootstrap over prompts."""

    kind: FitKind
    """best_of_n: d (a - b d); rl: d (a - b log d)."""
    start: float
    """Mean score at d = 0, to which the formula is added."""
    a: float
    b: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]
    d: list[float]
    """Points of the curve, from 0 to the largest d of the data."""
    curve: list[float]
    """Score at each of these points."""
    low: list[float]
    """Lower end of the band there."""
    high: list[float]
    """Upper end."""


def fit_gao(kind: FitKind, d: ArrayLike, scores: ArrayLike, *, seed: int = 0) -> GaoFit:
    """Fit score(d) = start + d (a - b d), or for RL start + d (a - b log d), by least squares.

    Start is the mean score at d = 0. The bootstrap draws prompts, each with its scores at all d.

    Args:
        d: [K] ascending, the first 0 and at least two more.
        scores: [P, K] of P prompts.

    Raises:
        ValueError: d is not as described.
    """
    d, scores = np.asarray(d, np.float64), np.asarray(scores, np.float64)
    if len(d) < 3 or d[0] != 0 or (np.diff(d) <= 0).any():
        raise ValueError(f"d: {d.tolist()}; expected 0 and at least two larger values, ascending")
    prompts, points = len(scores), np.linspace(0, d[-1], _POINTS)
    counts = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=_DRAWS)
    means = np.concatenate([np.full((1, prompts), 1.0), counts]) @ scores / prompts  # [1 + draws, K]
    start = means[:, :1]
    coefficients = (means - start)[:, 1:] @ np.linalg.pinv(_features(kind, d[1:])).T  # [1 + draws, 2]
    curves = start + coefficients @ _features(kind, points).T
    ends = (1 - _LEVEL) / 2, (1 + _LEVEL) / 2
    (a_low, b_low), (a_high, b_high) = np.quantile(coefficients[1:], ends, axis=0).tolist()
    low, high = np.quantile(curves[1:], ends, axis=0)
    (a, b) = coefficients[0].tolist()
    return GaoFit(
        kind=kind,
        start=float(start[0, 0]),
        a=a,
        b=b,
        a_interval=(a_low, a_high),
        b_interval=(b_low, b_high),
        d=points.tolist(),
        curve=curves[0].tolist(),
        low=low.tolist(),
        high=high.tolist(),
    )


def _features(kind: FitKind, d: Floats) -> Floats:
    """Return the factors [len(d), 2] of a and b; 0 at d = 0."""
    if kind == "best_of_n":
        return np.stack([d, -(d**2)], axis=1)
    return np.stack([d, -d * np.log(np.where(d > 0, d, 1))], axis=1)
