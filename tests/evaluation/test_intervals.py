"""The statistics of the reports against scikit-learn and scipy."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from nemo_eppo.evaluation import intervals
from nemo_eppo.evaluation.intervals import (
    Estimate,
    bootstrap_auprc,
    bootstrap_auroc,
    bootstrap_mean,
    estimate_share,
    false_alarms_per_1000,
    numbered,
    share_over_prompts,
    threshold_at_recall,
    threshold_at_share,
)

DRAWS = 400


@pytest.fixture
def sample() -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of 150 samples, many of which have equal scores."""
    draw = np.random.default_rng(3)
    labels = draw.random(150) < 0.3
    return labels, np.round(draw.normal(size=150) + labels, 1)


@pytest.mark.parametrize(
    ("bootstrap", "sklearn"), [(bootstrap_auroc, roc_auc_score), (bootstrap_auprc, average_precision_score)]
)
@pytest.mark.parametrize("answers", [1, 4])
def test_areas_of_every_draw_are_those_of_scikit_learn(
    answers: int,
    bootstrap: Callable[..., Estimate],
    sklearn: Callable[..., float],
    sample: tuple[np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", DRAWS)
    labels, scores = sample
    groups = np.arange(150) // answers  # the last is smaller
    size = groups[-1] + 1
    found = bootstrap(labels, scores, groups, seed=5)
    draw = np.random.default_rng(5)
    areas = []
    for _ in range(DRAWS):
        drawn = np.concatenate([np.flatnonzero(groups == group) for group in draw.integers(size, size=size)])
        areas.append(sklearn(labels[drawn], scores[drawn]))
    wanted = Estimate(sklearn(labels, scores), *np.quantile(areas, [0.025, 0.975]))
    assert found == pytest.approx(wanted, abs=1e-12)
    monkeypatch.setattr(intervals, "_BLOCK", 7 * 150)
    assert bootstrap(labels, scores, groups, seed=5) == found, "whatever the size of a block"


def test_the_interval_of_a_mean_is_that_of_scipy(
    sample: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", 20_000)
    values = sample[1]
    found = bootstrap_mean(values, seed=1)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.95, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.01)


def test_the_interval_of_a_mean_over_groups_is_that_of_scipy(
    sample: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", 10_000)
    values, groups = np.sort(sample[1])[:144], np.repeat(np.arange(36), [2, 6] * 18)  # much alike in a group
    found = bootstrap_mean(values, seed=1, groups=groups)
    wanted = stats.bootstrap(
        (np.bincount(groups, values), np.bincount(groups)),
        lambda sums, numbers, axis: sums.sum(axis) / numbers.sum(axis),
        paired=True, n_resamples=10_000, confidence_level=0.95, method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.03)
    alone = bootstrap_mean(values, seed=1)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize(("ones", "number"), [(10, 10), (0, 7), (3, 40), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(ones: int, number: int) -> None:
    found = estimate_share([1.0] * ones + [0.0] * (number - ones))
    wanted = stats.binomtest(ones, number).proportion_ci(method="wilson")
    assert found == pytest.approx((ones / number, wanted.low, wanted.high), abs=1e-12)
    assert (found.low == 0, found.high == 1) == (ones == 0, ones == number), "exactly"


@pytest.mark.parametrize("groups", [None, [7]])
def test_the_mean_of_one_group_has_no_interval(groups: list[int] | None) -> None:
    found = bootstrap_mean([2.0], seed=1, groups=groups)
    assert found == (2.0, -math.inf, math.inf)
    assert found.cell() == "2.000<small>no interval of one</small>"
    assert found.as_dict() == {"value": 2.0, "low": None, "high": None}
    assert bootstrap_auroc([True, False], [2.0, 1.0], [7, 7], seed=0) == (1.0, -math.inf, math.inf)


def test_the_interval_of_a_score_with_ties_holds_it_as_often_as_it_says() -> None:
    draw, outcomes, chances = np.random.default_rng(0), [0.0, 0.5, 1.0], [0.1, 0.5, 0.4]
    held, widths = 0, []
    for _ in range(2_000):
        _, low, high = estimate_share(draw.choice(outcomes, size=60, p=chances))
        held += low <= 0.65 <= high
        widths.append(high - low)
    assert 0.935 < held / 2_000 < 0.97
    assert np.mean(widths) < 0.17, "ones and zeros of this mean have 0.23"
    assert estimate_share([0.5] * 8).low < 0.45, "equal values are no certainty"


def test_a_draw_without_one_of_the_labels_is_left_out() -> None:
    found = bootstrap_auroc([True, False, False], [3.0, 1.0, 2.0], range(3), seed=0)
    assert found == Estimate(1.0, 1.0, 1.0)


def test_labels_of_one_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="all 2 are True"):
        bootstrap_auroc([True, True], [1.0, 2.0], range(2), seed=0)


@pytest.mark.parametrize(
    ("scores", "threshold"), [(range(100), 90), ([1, 2, 2, *range(3, 20)], 18), ([5] * 3 + [1] * 17, 5), ([2, 2], 2)]
)
def test_a_tenth_of_the_scores_reach_the_threshold_or_those_that_are_highest(
    scores: Sequence[int], threshold: int
) -> None:
    assert threshold_at_share(scores, 0.1) == threshold


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_false_alarms_are_those_of_the_roc_curve(sample: tuple[np.ndarray, np.ndarray], recall: float) -> None:
    labels, scores = sample
    false, true, thresholds = roc_curve(labels, scores, drop_intermediate=False)
    first = np.flatnonzero(true >= recall)[0]
    threshold = threshold_at_recall(labels, scores, recall)
    assert threshold == thresholds[first]
    assert false_alarms_per_1000(labels, scores, threshold) == pytest.approx(1000 * false[first])


def test_each_prompt_counts_alike_in_a_share() -> None:
    found = share_over_prompts([1.0, 1.0, 0.5, 0.5, 0.0], ["b", "a", "b", "b", "a"])
    assert numbered(["b", "a", "b"]).tolist() == [0, 1, 0]
    assert found == pytest.approx(estimate_share([2 / 3, 0.5]))
