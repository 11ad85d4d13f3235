"""Statistics of the reports: Wilson's intervals of shares, percentile-bootstrap intervals that a seed makes the same.

Labels are bool [N], True for what is to be found; scores are [N], higher where it is more likely; groups are [N], what
samples that are not independent have in common, as the answers to one prompt: a draw takes or leaves all of a group.
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
_LEVEL = 0.95  # share of the draws that an interval holds
_FEWEST_GROUPS = 5
_BLOCK = 4_000_000  # numbers that one block of draws has, to bound memory


class Estimate(NamedTuple):
    """A value and its interval, from -inf to inf where the samples say nothing of it."""

    value: float
    low: float
    high: float

    def cell(self, digits: int = 3) -> str:
        """Return the value above its interval, as HTML for a cell of a table."""
        return f"{self.value:.{digits}f}<small>{self.interval(digits)}</small>"

    def interval(self, digits: int) -> str:
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}" if math.isfinite(self.low) else "no interval of one"

    def as_dict(self) -> dict[str, float | None]:
        """Return it for a JSON file; an end that is infinite is None."""
        return {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}


def bootstrap_mean(values: ArrayLike, seed: int, groups: ArrayLike | None = None) -> Estimate:
    """Estimate a mean; that of a paired difference if `values` are the differences of the pairs.

    Args:
        values: [N], one of each sample; N > 0.
        groups: [N]; None if all samples are independent. One group alone has no interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    of_groups = np.arange(len(sample)) if groups is None else np.asarray(groups)
    if len(np.unique(of_groups)) < 2:
        return Estimate(float(sample.mean()), -math.inf, math.inf)
    blocks = _resampled(of_groups, seed)
    means = [counts @ sample / counts.sum(axis=1) for counts in blocks]
    return _estimate(float(sample.mean()), np.concatenate(means))


def estimate_share(values: ArrayLike) -> Estimate:
    """Estimate the mean of numbers from 0 to 1 by Wilson's score interval (1927), which has a width even if all agree.

    Numbers between 0 and 1, as a tie, vary less than ones and zeros of the same mean: they count as so many of these as
    have their variance, to which a zero and a one are added lest it be 0.

    Args:
        values: [N], one of each independent sample; N > 0.
    """
    shares = np.asarray(values, dtype=np.float64)
    share, z = float(shares.mean()), float(norm.isf((1 - _LEVEL) / 2))
    variance = share * (1 - share)
    size = len(shares) * max(1.0, variance / np.append(shares, [0, 1]).var())
    centre, half = share + z**2 / (2 * size), z * math.sqrt(variance / size + (z / (2 * size)) ** 2)
    low, high = ((centre + side) / (1 + z**2 / size) for side in (-half, half))
    return Estimate(share, low if share > 0 else 0.0, high if share < 1 else 1.0)  # which rounding may miss


def share_over_prompts(values: ArrayLike, prompts: Iterable[Hashable]) -> Estimate:
    """Estimate a share as `estimate_share` does, each prompt counted alike: answers to one are not independent.

    Args:
        values: [N] from 0 to 1, one of each answer; N > 0.
        prompts: [N], what the answers to one prompt have in common.
    """
    prompt = numbered(prompts)
    return estimate_share(np.bincount(prompt, np.asarray(values, dtype=np.float64)) / np.bincount(prompt))


def numbered(names: Iterable[Hashable]) -> NDArray[np.int64]:
    """Return the number [N] of each name, from 0 in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def bootstrap_auroc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate:
    """Estimate the area under the ROC curve: how often a sample to be found has the higher score, ties half.

    Raises:
        ValueError: not both labels occur.
    """
    return _bootstrap(roc_auc_score, _aurocs, labels, scores, groups, seed)


def bootstrap_auprc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate:
    """Estimate the average precision, which is the share of labels that are True where scores say nothing.

    Raises:
        ValueError: not both labels occur.
    """
    return _bootstrap(average_precision_score, _average_precisions, labels, scores, groups, seed)


def within_groups_auroc(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike, seed: int) -> Estimate | None:
    """Estimate the AUROC over pairs of one group, so that what differs between groups alone does not count.

    Args:
        groups: [N], for instance the step of a run; the bootstrap draws them.

    Returns:
        None if fewer than five groups have both labels, of which an interval says nothing.
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
    """Return the highest threshold at which scores >= threshold find at least the fraction `recall` of True labels."""
    found = np.sort(np.asarray(scores, dtype=np.float64)[np.asarray(labels, dtype=bool)])[::-1]
    return float(found[max(math.ceil(recall * len(found) - 1e-9), 1) - 1])


def threshold_at_share(scores: ArrayLike, share: float) -> float:
    """Return the lowest score that at most the fraction `share` of scores reach, or the highest where more have it."""
    values, numbers = np.unique(np.asarray(scores, dtype=np.float64), return_counts=True)
    reached = numbers[::-1].cumsum()[::-1]
    few = values[reached <= share * numbers.sum() + 1e-9]
    return float(few[0] if len(few) else values[-1])


def false_alarms_per_1000(labels: ArrayLike, scores: ArrayLike, threshold: float) -> float:
    """Return how many of 1,000 samples whose label is False have a score >= threshold."""
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
    # places in the sorted samples where a new score begins: equal scores are found together
    starts = np.flatnonzero(np.diff(ranked[descending], prepend=np.inf))
    areas = []
    for counts in _resampled(groups, seed):
        weights = counts[:, descending]
        positives = np.add.reduceat(weights * truth[descending], starts, axis=1)
        areas.append(of_draws(positives, np.add.reduceat(weights, starts, axis=1) - positives))
    return _estimate(float(exact(truth, ranked)), np.concatenate(areas))


def _aurocs(positives: Floats, negatives: Floats) -> Floats:
    """AUROC [draws] from how often samples with each score, highest first, were drawn [draws, scores]."""
    higher = positives.cumsum(axis=1) - positives / 2
    with np.errstate(invalid="ignore"):  # a draw without one of the labels is NaN
        area: Floats = (negatives * higher).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))
    return area


def _average_precisions(positives: Floats, negatives: Floats) -> Floats:
    found = positives.cumsum(axis=1)
    precision = found / np.maximum(found + negatives.cumsum(axis=1), 1)
    with np.errstate(invalid="ignore"):
        area: Floats = (positives * precision).sum(axis=1) / positives.sum(axis=1)
    return area


def _resampled(groups: ArrayLike, seed: int) -> Iterator[Floats]:
    """Yield blocks [some draws, N]: how often each sample is in each draw of as many groups, with replacement."""
    names, group_of = np.unique(groups, return_inverse=True)
    size, draw = len(names), np.random.default_rng(seed)
    block = max(1, _BLOCK // len(group_of))
    for first in range(0, _DRAWS, block):
        rows = min(block, _DRAWS - first)
        drawn = draw.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        yield counts[:, group_of].astype(np.float64)


def _estimate(value: float, draws: Floats) -> Estimate:
    low, high = np.nanquantile(draws, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(value, float(low), float(high))
