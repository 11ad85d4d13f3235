"""GAE against the definition, written as loops in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nemo_eppo.algorithms.advantages import gae
from nemo_eppo.algorithms.masking import response_mask

PROMPTS, LENGTHS, S = torch.tensor([3, 1, 5, 39]), torch.tensor([8, 40, 6, 40]), 40
MASK = response_mask(PROMPTS, LENGTHS, S)


def gae_by_definition(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, after: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    advantages, returns = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for b in range(len(MASK)):
        next_value, advantage = after[b], 0.0
        for t in range(int(LENGTHS[b]) - 2, int(PROMPTS[b]) - 2, -1):
            delta = float(rewards[b, t]) + gamma * next_value - float(values[b, t])
            advantage = delta + gamma * lam * advantage
            next_value = float(values[b, t])
            advantages[b, t], returns[b, t] = advantage, advantage + next_value
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_follows_its_definition(gamma: float, lam: float) -> None:
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    expected = gae_by_definition(rewards, values, gamma, lam, [0.0] * 4)
    for result, wanted in zip(gae(rewards, values, MASK, gamma, lam), expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-12)


def test_truncated_responses_are_bootstrapped_and_finished_ones_are_not() -> None:
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    truncated = torch.tensor([True, False, True, False])
    after = torch.randn(4, dtype=torch.float64)
    results = gae(rewards, values, MASK, 0.9, 0.8, True, truncated, after)
    expected = gae_by_definition(rewards, values, 0.9, 0.8, torch.where(truncated, after, 0.0).tolist())
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-12)


def test_without_bootstrap_values_the_last_scored_state_stands_in() -> None:
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    truncated = torch.ones(4, dtype=torch.bool)
    last_values = [float(values[b, LENGTHS[b] - 2]) for b in range(4)]
    expected = gae_by_definition(rewards, values, 0.9, 0.8, last_values)
    results = gae(rewards, values, MASK, 0.9, 0.8, True, truncated)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-12)


def test_padding_changes_no_bit() -> None:
    rewards, values = torch.randn(2, *MASK.shape)
    wide_rewards, wide_values = (torch.nn.functional.pad(x, (0, 31), value=1e9) for x in (rewards, values))
    wide = gae(wide_rewards, wide_values, torch.nn.functional.pad(MASK, (0, 31)), 0.99, 0.95)
    for padded_result, result in zip(wide, gae(rewards, values, MASK, 0.99, 0.95), strict=True):
        assert torch.equal(padded_result[:, : S - 1], result)


def test_without_discount_returns_are_the_rewards_to_go() -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64) * MASK
    _, returns = gae(rewards, torch.randn(MASK.shape, dtype=torch.float64), MASK, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1) * MASK)


def test_bad_input_is_refused() -> None:
    ones = torch.ones(1, 4)
    with pytest.raises(ValueError, match="unbroken"):
        gae(ones, ones, torch.tensor([[True, False, True, False]]), 1.0, 1.0)
    with pytest.raises(ValueError, match="truncated: needed"):
        gae(ones, ones, ones.bool(), 1.0, 1.0, bootstrap_truncated=True)
