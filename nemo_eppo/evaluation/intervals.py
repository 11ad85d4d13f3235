"""Intervals of the reports' estimates: Wilson's for shares, a seeded percentile bootstrap for means, AUROC and AUPRC.

Labels are bool [N], True for positives; scores are [N], higher where a positive is likelier; groups are [N], equal for
samples that are not independent, such as answers to one prompt: the bootstrap draws whole groups.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

Floats = NDArray[np.float64]
_DRAWS = 2_000
_LEVEL = 0.95  # coverage of an interval
_FEWEST_GROUPS = 5
_BLOCK = 4_000_000  # numbers in one block of draws, to bound memory


class Estimate(NamedTuple):
    """A value and its interval, from -inf to inf if a single group gives none."""

    value: float
    low: float
    high: float

    def cell(self, digits: int = 3) -> str:
        """Return the value above its interval, as HTML for a cell of a table."""
        return f"{self.value:.{digits}f}<small>{self.interval(digits)}</small>"

    def interval(self, digits: int) -> str:
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}" if math.isfinite(self.low) else "no interval of one"

    def as_dict(self) -> dict[str, float | None]:
        """Return the numbers for a JSON file; infinite ends are None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def bootstrap_mean(values: ArrayLike, seed: int, groups: ArrayLike | None = None) -> Estimate:
    """Estimate the mean of `values`, which may be the differences of pairs.

    Args:
        values: [N], one for each sample; N > 0.
        groups: [N]; None if all samples are independent. One group alone has no interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    group = np.arange(len(sample)) if groups is None else np.asarray(groups)
    if len(np.unique(group)) < 2:
        return Estimate(float(sample.mean()), -math.inf, math.inf)
    means = [counts @ sample / counts.sum(axis=1) for counts in _resampled(group, seed)]
    return _estimate(float(sample.mean()), np.concatenate(means))


def estimate_share(values: ArrayLike) -> Estimate:
    """Estimate the mean of numbers from 0 to 1 by Wilson's score interval (1927), which has a width even if all agree.

    Numbers between 0 and 1, such as a tie's 0.5, vary less than ones and zeros of the same mean: the sample size is
    scaled up by the ratio of the variances. A zero and a one are added to the numbers, or their variance might be 0.

    Args:
        values: [N], one for each independent sample; N > 0.
    """
    shares = np.asarray(values, dtype=np.float64)
    share, z = float(shares.mean()), float(norm.isf((1 - _LEVEL) / 2))
    variance = share * (1 - share)
    size = len(shares) * max(1.0, variance / np.append(shares, [0, 1]).var())
    centre, half = share + z**2 / (2 * size), z * math.sqrt(variance / size + (z / (2 * size)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / size) for side in (-half, half))
    return Estimate(share, low if share > 0 else 0.0, high if share < 1 else 1.0)  # exactly, despite rounding


def share_over_prompts(values: ArrayLike, prompts: Iterable[Hashable]) -> Estimate:
    """Estimate a share by `estimate_share` from the mean of each prompt, since its answers are not independent.

    Args:
        values: [N] from 0 to 1, one for each answer; N > 0.
        prompts: [N], the prompt of each answer, or a name of it.
    """
    prompt = numbered(prompts)
    return estimate_share(np.bincount(prompt, np.asarray(values, dtype=np.float64)) / np.bincount(prompt))


def numbered(names: Iterable[Hashable]) -> NDArray[np.int64]:
    """Return the number [N] of each name, from 0 in the order of their first occurrence."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def bootstrap_auroc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate:
    """Estimate the area under the ROC curve: how often a positive has a higher score than a negative, ties half.

    Raises:
        ValueError: not both labels occur.
    """
    return _bootstrap(roc_auc_score, _aurocs, labels, scores, groups, seed)


def bootstrap_auprc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate:
    """Estimate the average precision; scores at random have the share of True labels.

    Raises:
        ValueError: not both labels occur.
    """
    return _bootstrap(average_precision_score, _average_precisions, labels, scores, groups, seed)


def within_groups_auroc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate | None:
    """Estimate the AUROC over pairs inside a group, so that differences between groups do not count.

    Args:
        groups: [N], for instance the step of a run; the bootstrap draws them.

    Returns:
        None if fewer than five groups have both labels, too few for an interval.
    """
    truth, values, group = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64), np.asarray(groups)
    areas, pairs = [], []
    for member in (group == name for name in np.unique(group)):
        number = int(truth[member].sum()) * int((~truth[member]).sum())
        if number:
            areas.append(float(roc_auc_score(truth[member], values[member])))
            pairs.append(number)
    if len(pairs) < _FEWEST_GROUPS:
        return None
    weights = np.array(pairs)
    wins = weights * areas
    draws = [counts @ wins / (counts @ weights) for counts in _resampled(np.arange(len(pairs)), seed)]
    return _estimate(float(wins.sum() / weights.sum()), np.concatenate(draws))


def threshold_at_recall(labels: ArrayLike, scores: ArrayLike, recall: float) -> float:
    """Return the highest threshold that the scores of at least the fraction `recall` of the positives reach."""
    positives = np.sort(np.asarray(scores, dtype=np.float64)[np.asarray(labels, dtype=bool)])[::-1]
    return float(positives[max(math.ceil(recall * len(positives) - 1e-9), 1) - 1])


def threshold_at_share(scores: ArrayLike, share: float) -> float:
    """Return the lowest score that at most the fraction `share` of scores reach, else the highest score."""
    values, numbers = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    reached = numbers[::-1].cumsum()[::-1]
    rare = values[reached <= share * numbers.sum() + 1e-9]
    return float(rare[0] if len(rare) else values[-1])


def false_alarms_per_1000(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Return how many of 1,000 negatives have a score >= threshold."""
    return 1000 * float((np.asarray(scores)[~np.asarray(labels, dtype=bool)] >= threshold).mean())


def _bootstrap(
    exact: Callable[[NDArray[np.bool_], Floats], float],
    of_draws: Callable[[Floats, Floats], Floats],
    labels: ArrayLike,
    scores: ArrayLike,
    groups: ArrayLike,
    seed: int,
) -> Estimate:
    truth, ranked = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if truth.all() or not truth.any():
        raise ValueError(f"labels: all {len(truth)} are {bool(truth.any())}; expected both True and False")
    if len(np.unique(groups)) < 2:
        return Estimate(float(exact(truth, ranked)), -math.inf, math.inf)
    descending = np.argsort(-ranked, kind="stable")
    # where a new score begins in the sorted samples: equal scores are counted together
    starts = np.flatnonzero(np.diff(ranked[descending], prepend=np.inf))
    areas = []
    for counts in _resampled(groups, seed):
        weights = counts[:, descending]
        positives = np.add.reduceat(weights * truth[descending], starts, axis=1)
        areas.append(of_draws(positives, np.add.reduceat(weights, starts, axis=1) - positives))
    return _estimate(float(exact(truth, ranked)), np.concatenate(areas))


def _aurocs(positives: Floats, negatives: Floats) -> Floats:
    """Return the AUROC [draws], given how often each score, highest first, was drawn [draws, scores]."""
    higher = positives.cumsum(axis=1) - positives / 2
    with np.errstate(invalid="ignore"):  # a draw without one of the labels is NaN
        area: Floats = (negatives * higher).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))
    return area


def _average_precisions(positives: Floats, negatives: Floats) -> Floats:
    """Return the average precision [draws] of the same counts."""
    true_positives = positives.cumsum(axis=1)
    precision = true_positives / np.maximum(true_positives + negatives.cumsum(axis=1), 1)
    with np.errstate(invalid="ignore"):
        area: Floats = (positives * precision).sum(axis=1) / positives.sum(axis=1)
    return area


def _resampled(groups: ArrayLike, seed: int) -> Iterator[Floats]:
    """Yield, in blocks of draws [block, N], how often each sample is drawn; a draw resamples the groups."""
    names, group_of = np.unique(groups, return_inverse=True)
    size, generator = len(names), np.random.default_rng(seed)
    block = max(1, _BLOCK // len(group_of))
    for first in range(0, _DRAWS, block):
        rows = min(block, _DRAWS - first)
        drawn = generator.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield counts[:, group_of].astype(np.float64)


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = np.nanquantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value, float(low), float(high))
