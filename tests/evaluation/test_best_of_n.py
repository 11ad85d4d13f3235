"""Best-of-n against all subsets and closed forms; Gao's fits against curves with known coefficients and scipy."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.special import comb

from nemo_eppo.evaluation.best_of_n import best_of_n, best_of_n_kl, fit_gao, subset_sizes
from nemo_eppo.evaluation.evaluation_page import _band


def over_all_subsets(proxy: Any, scores: Any, n: int) -> float:
    """Mean score of the best answer of each subset; of several best ones, their mean."""
    chosen = []
    for subset in map(list, combinations(range(len(proxy)), n)):
        best = proxy[subset] == proxy[subset].max()
        chosen.append(scores[subset][best].mean())
    return float(np.mean(chosen))


@pytest.mark.parametrize("ties", [False, True])
def test_the_estimator_is_the_mean_over_all_subsets(ties: bool) -> None:
    draw = np.random.default_rng(3)
    proxy, gold = draw.normal(size=(4, 8)), draw.normal(size=(4, 8))
    if ties:
        proxy = proxy.round()
        assert all(len(set(row)) < 8 for row in proxy)
    sizes = [1, 2, 3, 5, 8]
    got = best_of_n(proxy, gold, sizes)
    expected = [[over_all_subsets(p, g, n) for n in sizes] for p, g in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[:, 0], gold.mean(axis=1), rtol=1e-12)


def test_many_answers_have_the_closed_forms_of_order_statistics() -> None:
    """Of proxies 1 ... N the largest of n has the mean n (N + 1) / (n + 1)."""
    answers, sizes = 4_000, [1, 2, 7, 64, 1_000, 4_000]
    proxy = np.random.default_rng(0).permutation(answers)[None] + 1.0
    expected = [n * (answers + 1) / (n + 1) for n in sizes]
    np.testing.assert_allclose(best_of_n(proxy, proxy, sizes)[0], expected, rtol=1e-9)
    one_good = (proxy == answers).astype(float)  # chosen wherever it is in the subset: for a share n / N of them
    share = [comb(answers - 1, n - 1, exact=True) / comb(answers, n, exact=True) for n in sizes]
    np.testing.assert_allclose(best_of_n(proxy, one_good, sizes)[0], share, rtol=1e-9)


def test_the_kl_is_that_of_the_best_of_n_of_a_continuous_reward() -> None:
    """The best of n has density n u^(n-1) over the quantiles u of the policy's rewards."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    for n in (1, 2, 5, 30):
        density = n * u ** (n - 1)
        assert best_of_n_kl(n) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-4)


def test_sizes_are_powers_of_two_and_all_answers() -> None:
    assert subset_sizes(1) == [1]
    assert subset_sizes(16) == [1, 2, 4, 8, 16]
    assert subset_sizes(20) == [1, 2, 4, 8, 16, 20]


def rl(d: Any, a: float, b: float) -> Any:
    return d * (a - b * np.log(d))


def bon(d: Any, a: float, b: float) -> Any:
    return d * (a - b * d)


@pytest.mark.parametrize(("kind", "curve"), [("best_of_n", bon), ("rl", rl)])
def test_a_fit_finds_the_coefficients_and_least_squares(kind: Any, curve: Any) -> None:
    d = np.array([0, 0.3, 0.8, 1.2, 2.0, 3.1])
    clean = np.concatenate([[0], curve(d[1:], 0.9, 0.25)])
    exact = fit_gao(kind, d, 0.4 + np.tile(clean, (5, 1)))
    assert (exact.start, exact.a, exact.b) == pytest.approx((0.4, 0.9, 0.25))
    assert exact.curve[-1] == pytest.approx(0.4 + clean[-1])
    assert exact.curve[0] == pytest.approx(0.4)
    assert exact.low == pytest.approx(exact.high)
    noisy = clean + np.random.default_rng(1).normal(scale=0.3, size=(60, 6))
    fit = fit_gao(kind, d, noisy)
    gains = noisy.mean(axis=0) - noisy[:, 0].mean()
    expected, _ = curve_fit(curve, d[1:], gains[1:])
    assert (fit.a, fit.b) == pytest.approx(tuple(expected))
    assert fit.a_interval[0] < fit.a < fit.a_interval[1]
    assert fit.b_interval[0] < fit.b < fit.b_interval[1]
    assert all(low <= at <= high for low, at, high in zip(fit.low, fit.curve, fit.high, strict=True))


def test_the_intervals_hold_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_eppo.evaluation.best_of_n._DRAWS", 300)
    d, covered = np.array([0, 0.5, 1.0, 1.5, 2.0]), 0
    truth = bon(d, 1.0, 0.3)
    draw = np.random.default_rng(8)
    for seed in range(200):
        scores = truth + draw.normal(size=(40, 1)) + draw.normal(scale=0.5, size=(40, 5))
        low, high = fit_gao("best_of_n", d, scores, seed=seed).b_interval
        covered += low < 0.3 < high
    assert covered / 200 == pytest.approx(0.95, abs=0.04)


@pytest.mark.parametrize("d", [[0, 1], [0.1, 1, 2], [0, 2, 1]])
def test_too_few_or_unordered_places_are_refused(d: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 0 and at least two larger values"):
        fit_gao("best_of_n", d, np.zeros((3, len(d))))


def test_the_band_on_the_page_is_that_of_the_fit_and_no_other() -> None:
    kl = best_of_n_kl([1, 2, 4, 8])
    scores = np.random.default_rng(0).exponential(size=(20, 4)).cumsum(axis=1)  # skew
    fit = fit_gao("best_of_n", np.sqrt(kl), scores)
    points = np.add(scores.mean(axis=0), [0, 0.5, -0.5, 0.5])  # which the fit does not pass through
    below, above = _band(fit, kl.tolist(), points.tolist())
    assert points - below == pytest.approx(np.interp(np.sqrt(kl), fit.d, fit.low))
    assert points + above == pytest.approx(np.interp(np.sqrt(kl), fit.d, fit.high))
