"""The bottleneck's KL divergence in both modes, against torch.distributions and the numbers that tell them apart."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from nemo_eppo.algorithms.inform import latent_kl

MEAN, LOGVAR = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()


def test_the_paper_sums_the_divergence_from_the_standard_normal() -> None:
    exact = kl_divergence(Normal(MEAN, (LOGVAR / 2).exp()), Normal(torch.zeros(1), torch.ones(1)))
    torch.testing.assert_close(latent_kl(MEAN, LOGVAR, "paper_sum"), exact.sum(1))


def test_the_authors_code_averages_over_latents_first() -> None:
    for row in range(len(MEAN)):
        m, v = float(MEAN[row].mean()), float(LOGVAR[row].mean())
        expected = -0.5 * (1 + v - m**2 - torch.tensor(v).double().exp().item())
        assert float(latent_kl(MEAN, LOGVAR, "official_mean_first")[row]) == pytest.approx(expected)


def test_latents_of_mean_zero_and_std_3_cost_2391_in_one_mode_and_nothing_in_the_other() -> None:
    # d = 512 draws of std 3, centred; their own std is the 3.056 with which half the sum of squares is 2391
    draw = torch.randn(512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = draw - draw.mean()
    mean = (draw * (2 * 2391 / draw.square().sum()).sqrt())[None]
    assert float(mean.std()) == pytest.approx(3, abs=0.1)
    logvar = torch.zeros(1, 512, dtype=torch.float64)
    assert float(latent_kl(mean, logvar, "paper_sum")) == pytest.approx(2391)
    assert float(latent_kl(mean, logvar, "official_mean_first")) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("mode", ["paper_sum", "official_mean_first"])
def test_gradients_agree_with_differences(mode: str) -> None:
    inputs = (MEAN.clone().requires_grad_(), LOGVAR.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda m, v: latent_kl(m, v, mode), inputs)  # type: ignore[arg-type]
