"""Masks and masked statistics against numpy."""

import numpy as np
import pytest
import torch

from nemo_eppo.algorithms.masking import (
    last_action,
    masked_mean,
    masked_sum,
    require_finite,
    response_mask,
    whiten,
    zero_outside,
)


def test_an_action_is_masked_in_if_the_token_it_predicts_is_a_response_token() -> None:
    prompt_lengths, lengths = torch.tensor([2, 1, 4]), torch.tensor([5, 2, 6])
    mask = response_mask(prompt_lengths, lengths, 6)
    for b in range(3):
        for t in range(5):
            assert bool(mask[b, t]) == (prompt_lengths[b] <= t + 1 < lengths[b])
    assert torch.equal(mask.sum(1), lengths - prompt_lengths)


@pytest.mark.parametrize(("prompt", "length"), [(0, 3), (4, 3), (2, 7)])
def test_impossible_lengths_are_errors_that_name_the_sample(prompt: int, length: int) -> None:
    with pytest.raises(ValueError, match="sample 1 has prompt_length"):
        response_mask(torch.tensor([1, prompt]), torch.tensor([3, length]), 6)


def test_masked_statistics_match_numpy() -> None:
    x, mask = torch.randn(6, 9, dtype=torch.float64), torch.rand(6, 9) < 0.6
    mask[:, 0] = True
    chosen = x[mask].numpy()
    np.testing.assert_allclose(masked_sum(x, mask), chosen.sum())
    np.testing.assert_allclose(masked_mean(x, mask), chosen.mean())
    rows = np.array([row[m].mean() for row, m in zip(x.numpy(), mask.numpy(), strict=True)])
    np.testing.assert_allclose(masked_mean(x, mask, dim=1), rows)

    white = whiten(x, mask)
    np.testing.assert_allclose(white[mask], (chosen - chosen.mean()) / chosen.std(), rtol=1e-6)


def test_statistics_do_not_depend_on_padding() -> None:
    x, mask = torch.randn(4, 7, dtype=torch.float64), torch.rand(4, 7) < 0.7
    padded_x = torch.nn.functional.pad(x, (0, 5), value=1e9)
    padded_mask = torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(whiten(padded_x, padded_mask)[:, :7], whiten(x, mask), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("constant", [0.1, 0.7, 4.0, 1000.1])
def test_whitening_a_constant_gives_zeros(constant: float) -> None:
    white = whiten(torch.full((2, 1000), constant), torch.ones(2, 1000, dtype=torch.bool))
    assert not white.any()
    assert white.dtype == torch.float32


def test_half_precision_is_averaged_in_fp32() -> None:
    x = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    mean = masked_mean(x, torch.ones_like(x, dtype=torch.bool))
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x[0, 0].float())


def test_last_action_is_where_the_mask_ends() -> None:
    mask = response_mask(torch.tensor([2, 1, 4]), torch.tensor([5, 2, 6]), 6)
    assert last_action(mask).tolist() == [3, 0, 4]
    mask[1] = False
    with pytest.raises(ValueError, match=r"no response token in samples \[1\]"):
        last_action(mask)


def test_a_mean_over_nothing_is_an_error() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        masked_mean(torch.ones(2, 2), mask, dim=1)
    with pytest.raises(ValueError, match="the batch"):
        masked_mean(torch.ones(2, 2), mask & False)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)])
def test_a_mask_of_wrong_type_or_shape_is_an_error(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask: expected bool"):
        zero_outside(torch.ones(2, 3), mask)


def test_require_finite_names_quantity_and_place() -> None:
    x = torch.zeros(3, 4)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match="logprobs: nan in sample 2 at position 1"):
        require_finite("logprobs", x)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[2, 1] = False
    require_finite("logprobs", x, mask)
    with pytest.raises(ValueError, match="scores: inf in sample 0"):
        require_finite("scores", torch.tensor([float("inf")]))
