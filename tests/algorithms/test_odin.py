"""ODIN's length loss against numpy; its slopes against autograd, in any split of the batch."""

import numpy as np
import pytest
import torch

from nemo_eppo.algorithms.odin import length_loss, length_slopes, pearson

N = 12
QUALITY, LENGTH_SCORES = torch.randn(2, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64).unbind()
LENGTHS = torch.tensor([3, 9, 5, 12, 1, 7, 4, 8, 8, 2, 20, 6])


def test_the_correlation_is_numpys() -> None:
    expected = np.corrcoef(QUALITY.numpy(), LENGTHS.numpy())[0, 1]
    assert float(pearson(QUALITY, LENGTHS.double())) == pytest.approx(expected)


def test_the_length_loss_is_the_documented_formula() -> None:
    quality, length = (np.corrcoef(x.numpy(), LENGTHS.numpy())[0, 1] for x in (QUALITY, LENGTH_SCORES))
    assert float(length_loss(QUALITY, LENGTH_SCORES, LENGTHS)) == pytest.approx(abs(quality) - length)


def test_gradients_agree_with_differences() -> None:
    inputs = (QUALITY.clone().requires_grad_(), LENGTH_SCORES.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda q, s: length_loss(q, s, LENGTHS), inputs)


@pytest.mark.parametrize("parts", [[12], [5, 7], [1] * 12])
def test_no_split_of_the_batch_changes_the_gradient(parts: list[int]) -> None:
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(N, 3, dtype=torch.float64)
    quality, length_scores = (features @ weights.T).unbind(1)
    (exact,) = torch.autograd.grad(length_loss(quality, length_scores, LENGTHS), weights)
    slopes = length_slopes(quality, length_scores, LENGTHS)
    for x, q_slope, l_slope in zip(features.split(parts), *(s.split(parts) for s in slopes), strict=True):
        q, s = (x @ weights.T).unbind(1)
        (q_slope * q + l_slope * s).sum().backward()
    torch.testing.assert_close(weights.grad, exact)


def test_constants_have_no_correlation_and_no_slope() -> None:
    constant = torch.full((N,), 0.3)
    for quality, lengths in ((constant, LENGTHS), (QUALITY.float(), torch.full((N,), 7))):
        slopes = length_slopes(quality, constant, lengths)
        assert float(length_loss(quality, constant, lengths)) == 0
        assert not torch.stack(slopes).any()
