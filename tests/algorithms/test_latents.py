"""Distances of latents to the SFT model's, against numpy, scipy and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.stats import chi2
from sklearn.covariance import LedoitWolf

from nemo_eppo.algorithms.latents import fit_gaussian, mahalanobis, outlier_fraction

WIDTH = 6
MIX = np.random.default_rng(7).normal(size=(WIDTH, WIDTH))


def sample(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)) @ MIX + shift


@pytest.mark.parametrize("count", [4, 30, 5000])  # fewer than WIDTH: only shrinking makes the covariance invertible
def test_automatic_shrinkage_is_that_of_ledoit_and_wolf(count: int) -> None:
    latents = sample(count, 1)
    gaussian = fit_gaussian(torch.from_numpy(latents))
    oracle = LedoitWolf().fit(latents)
    np.testing.assert_allclose(gaussian.mean.numpy(), oracle.location_, rtol=1e-12)
    np.testing.assert_allclose((gaussian.factor @ gaussian.factor.T).numpy(), oracle.covariance_, rtol=1e-10)


def test_a_distance_is_that_of_scipy() -> None:
    base, latents = sample(40, 2), sample(9, 3, shift=2.0)
    inverse = np.linalg.inv(LedoitWolf().fit(base).covariance_)
    expected = [scipy_mahalanobis(row, base.mean(axis=0), inverse) for row in latents]
    found = mahalanobis(torch.from_numpy(latents), fit_gaussian(torch.from_numpy(base)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_outliers_are_counted_by_their_chi_squared_p_value() -> None:
    base = torch.from_numpy(sample(400, 4))
    gaussian = fit_gaussian(base)
    latents = torch.from_numpy(np.concatenate([sample(300, 5), sample(100, 6, shift=8.0)]))
    for alpha in (0.5, 0.05, 1e-6):
        p_values = chi2.sf(mahalanobis(latents, gaussian).numpy() ** 2, df=WIDTH)
        assert 0 < (p_values < alpha).mean() < 1
        assert outlier_fraction(latents, gaussian, alpha) == (p_values < alpha).mean()


def test_of_the_gaussians_own_samples_a_fraction_alpha_are_outliers() -> None:
    gaussian = fit_gaussian(torch.from_numpy(sample(20000, 8)))
    assert outlier_fraction(torch.from_numpy(sample(20000, 9)), gaussian, 0.05) == pytest.approx(0.05, abs=0.006)


def test_half_precision_latents_far_from_zero_are_measured_in_fp64() -> None:
    base = (torch.from_numpy(sample(200, 10)) + 100).bfloat16()
    found = mahalanobis(base, fit_gaussian(base))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, mahalanobis(base.double(), fit_gaussian(base.double())), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 3), r"shape \(1, 3\); expected \[N, d\] with N at least 2"),
        (torch.full((4, 3), torch.nan), "nan in sample 0"),
        (torch.ones(4, 3), "4 latents of width 3 is singular"),
    ],
)
def test_latents_without_a_gaussian_are_refused(latents: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_gaussian(latents)


def test_latents_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \[B, 6\]"):
        mahalanobis(torch.zeros(2, 3), fit_gaussian(torch.from_numpy(sample(20, 0))))
