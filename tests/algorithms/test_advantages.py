"""Advantage estimators against their definitions, written as loops in numpy."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from nemo_eppo.algorithms.advantages import ESTIMATORS, GAE, GRPO, RLOO, AdvantageEstimator, ReinforcePlusPlus, ReMax
from nemo_eppo.algorithms.choices import EstimatorName, Needs
from nemo_eppo.algorithms.masking import response_mask

PROMPTS, LENGTHS, S = torch.tensor([3, 1, 5, 39, 2]), torch.tensor([8, 40, 6, 40, 20]), 40
MASK = response_mask(PROMPTS, LENGTHS, S)
GROUPS = torch.tensor([12, -5, 12, -5, -5])  # of two and of three, mixed
FINISHED = torch.zeros(5, dtype=torch.bool)
TRUNCATED = torch.tensor([True, False, True, False, True])

ALL: dict[str, AdvantageEstimator] = {
    "gae": GAE(0.99, 0.95),
    "gae_bootstrapped": GAE(0.99, 0.95, bootstrap_truncated=True),
    "gae_not_whitened": GAE(0.99, 0.95, whiten=False),
    "grpo": GRPO(),
    "dr_grpo": GRPO(normalize_std=False),
    "rloo": RLOO(),
    "reinforce_plus_plus": ReinforcePlusPlus(0.99),
    "remax": ReMax(),
}


def response(b: int) -> range:
    """The actions of response `b`."""
    return range(int(PROMPTS[b]) - 1, int(LENGTHS[b]) - 1)


def gae_by_definition(
    rewards: Tensor, values: Tensor, gamma: float, lam: float, after: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    advantages, returns = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for b in range(len(MASK)):
        next_value, advantage = after[b], 0.0
        for t in reversed(response(b)):
            delta = float(rewards[b, t]) + gamma * next_value - float(values[b, t])
            advantage = delta + gamma * lam * advantage
            next_value = float(values[b, t])
            advantages[b, t], returns[b, t] = advantage, advantage + next_value
    return advantages, returns


def to_go_by_definition(rewards: Tensor, gamma: float) -> np.ndarray:
    result = np.zeros(MASK.shape)
    for b in range(len(MASK)):
        for t in response(b):
            result[b, t] = sum(gamma ** (u - t) * float(rewards[b, u]) for u in response(b) if u >= t)
    return result


def whitened(x: np.ndarray) -> np.ndarray:
    chosen = np.array([x[b, t] for b in range(len(MASK)) for t in response(b)])
    return np.where(MASK.numpy(), (x - chosen.mean()) / np.sqrt(chosen.var() + 1e-8), 0)


def totals(rewards: Tensor) -> list[float]:
    return [sum(float(rewards[b, t]) for t in response(b)) for b in range(len(MASK))]


def on_every_token(x: list[float]) -> np.ndarray:
    return np.array(x)[:, None] * MASK.numpy()


def close(result: Tensor | None, wanted: np.ndarray) -> None:
    assert result is not None
    np.testing.assert_allclose(result, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (0.9, 0.0), (0.0, 0.5)])
def test_gae_follows_its_definition(gamma: float, lam: float) -> None:
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    expected = gae_by_definition(rewards, values, gamma, lam, [0.0] * 5)
    for result, wanted in zip(
        GAE(gamma, lam, whiten=False)(rewards, values, MASK, GROUPS, TRUNCATED), expected, strict=True
    ):
        np.testing.assert_allclose(result, wanted, atol=1e-12)


def test_gae_whitens_the_advantages_and_not_the_returns() -> None:
    rewards, values = torch.randn(2, *MASK.shape, dtype=torch.float64)
    expected, wanted_returns = gae_by_definition(rewards, values, 0.9, 0.8, [0.0] * 5)
    advantages, returns = GAE(0.9, 0.8)(rewards, values, MASK, GROUPS, FINISHED)
    close(advantages, whitened(expected))
    close(returns, wanted_returns)


def test_truncated_responses_are_bootstrapped_and_finished_ones_are_not() -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64)
    values = torch.randn(5, S, dtype=torch.float64)
    after = [float(values[b, LENGTHS[b] - 1]) if TRUNCATED[b] else 0.0 for b in range(5)]
    results = GAE(0.9, 0.8, whiten=False, bootstrap_truncated=True)(rewards, values, MASK, GROUPS, TRUNCATED)
    expected = gae_by_definition(rewards, values, 0.9, 0.8, after)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, wanted, atol=1e-12)


def test_without_bootstrap_the_value_after_the_last_action_is_not_read() -> None:
    rewards, values = torch.randn(MASK.shape), torch.randn(5, S)
    wide = GAE(0.9, 0.8)(rewards, values, MASK, GROUPS, TRUNCATED)
    narrow = GAE(0.9, 0.8)(rewards, values[:, :-1], MASK, GROUPS, TRUNCATED)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


@pytest.mark.parametrize("normalize_std", [True, False])
def test_grpo_follows_its_definition(normalize_std: bool) -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64)
    total, expected = totals(rewards), []
    for b in range(5):
        group = [total[i] for i in range(5) if GROUPS[i] == GROUPS[b]]
        expected.append(total[b] - sum(group) / len(group))
        if normalize_std:
            expected[b] /= float(np.std(group, ddof=1)) + 1e-6
    advantages, returns = GRPO(normalize_std)(rewards, None, MASK, GROUPS, TRUNCATED)
    close(advantages, on_every_token(expected))
    assert returns is None


def test_equal_rewards_teach_nothing() -> None:
    rewards = torch.zeros(3, 4)
    rewards[:, -1] = 0.1
    ones, group = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    for estimator in (GRPO(), RLOO()):
        assert estimator(rewards, None, ones, group, ~ones[:, 0])[0].abs().max() < 1e-9


def test_rloo_follows_its_definition() -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64)
    total, expected = totals(rewards), []
    for b in range(5):
        others = [total[i] for i in range(5) if GROUPS[i] == GROUPS[b] and i != b]
        expected.append(total[b] - sum(others) / len(others))
    advantages, returns = RLOO()(rewards, None, MASK, GROUPS, TRUNCATED)
    close(advantages, on_every_token(expected))
    assert returns is None


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_plus_plus_follows_its_definition(gamma: float) -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64)
    advantages, returns = ReinforcePlusPlus(gamma)(rewards, None, MASK, GROUPS, TRUNCATED)
    close(advantages, whitened(to_go_by_definition(rewards, gamma)))
    assert returns is None


def test_remax_follows_its_definition() -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64)
    greedy = torch.randn(5, 1, dtype=torch.float64).expand(MASK.shape)
    advantages, returns = ReMax()(rewards, greedy, MASK, GROUPS, TRUNCATED)
    close(advantages, np.where(MASK.numpy(), to_go_by_definition(rewards, 1.0) - greedy.numpy(), 0))
    assert returns is None


def test_padding_changes_no_bit() -> None:
    rewards, values = torch.randn(2, *MASK.shape)
    wide_rewards, wide_values = (pad(x, (0, 31), value=1e9) for x in (rewards, values))
    estimator = GAE(0.99, 0.95, whiten=False)
    wide = estimator(wide_rewards, wide_values, pad(MASK, (0, 31)), GROUPS, FINISHED)
    for padded_result, result in zip(wide, estimator(rewards, values, MASK, GROUPS, FINISHED), strict=True):
        assert torch.equal(padded_result[:, : S - 1], result)


@pytest.mark.parametrize("name", ALL)
def test_padding_and_the_order_of_rows_change_nothing(name: str) -> None:
    rewards, values = torch.randn(MASK.shape, dtype=torch.float64), torch.randn(5, S, dtype=torch.float64)
    if ALL[name].needs == "greedy":
        values = values[:, :-1]
    order = torch.tensor([3, 0, 4, 2, 1])
    straight = ALL[name](rewards, values, MASK, GROUPS, TRUNCATED)
    wide_rewards, wide_values = (pad(x[order], (0, 31), value=1e9) for x in (rewards, values))
    moved = ALL[name](wide_rewards, wide_values, pad(MASK[order], (0, 31)), GROUPS[order], TRUNCATED[order])
    for result, moved_result in zip(straight, moved, strict=True):
        assert (result is None) == (moved_result is None)
        if result is not None and moved_result is not None:
            assert not moved_result[:, S - 1 :].any()
            torch.testing.assert_close(moved_result[:, : S - 1], result[order], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_results_are_in_fp32_unless_rewards_are_in_fp64(name: str) -> None:
    rewards, values = torch.randn(MASK.shape), torch.randn(5, S)
    if ALL[name].needs == "greedy":
        values = values[:, :-1]
    single = ALL[name](rewards, values, MASK, GROUPS, TRUNCATED)
    double = ALL[name](rewards.double(), values.double(), MASK, GROUPS, TRUNCATED)
    half = ALL[name](rewards.bfloat16(), values, MASK, GROUPS, TRUNCATED)
    assert half[0].dtype == single[0].dtype == torch.float32
    assert double[0].dtype == torch.float64
    torch.testing.assert_close(single[0].double(), double[0], rtol=1e-4, atol=1e-5)


def test_without_discount_returns_are_the_rewards_to_go() -> None:
    rewards = torch.randn(MASK.shape, dtype=torch.float64) * MASK
    _, returns = GAE(1.0, 1.0)(rewards, torch.randn(MASK.shape, dtype=torch.float64), MASK, GROUPS, FINISHED)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1) * MASK)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("row", "message"), [([True, False, True, False], "unbroken"), ([False] * 4, r"samples \[1\]")]
)
def test_gaps_and_empty_responses_are_refused(name: str, row: list[bool], message: str) -> None:
    ones, mask = torch.ones(2, 4), torch.tensor([[True] * 4, row])
    values = ones if ALL[name].needs == "greedy" else torch.ones(2, 5)
    with pytest.raises(ValueError, match=message):
        ALL[name](ones, values, mask, torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))


def test_values_of_another_shape_than_needed_are_refused() -> None:
    rewards = torch.randn(MASK.shape)
    with pytest.raises(ValueError, match=r"values: \[5, 39\]; expected the critic's \[B, T \+ 1\]"):
        GAE(1.0, 1.0, bootstrap_truncated=True)(rewards, rewards, MASK, GROUPS, TRUNCATED)
    with pytest.raises(ValueError, match=r"values: \[5, 41\]; expected the critic's \[B, T\] or \[B, T \+ 1\]"):
        GAE(1.0, 1.0)(rewards, pad(rewards, (0, 2)), MASK, GROUPS, TRUNCATED)
    for estimator in (GAE(1.0, 1.0), ReMax()):
        with pytest.raises(ValueError, match="values: None"):
            estimator(rewards, None, MASK, GROUPS, TRUNCATED)


@pytest.mark.parametrize("estimator", [GRPO(), RLOO()])
def test_a_group_of_one_is_refused_by_its_name(estimator: GRPO | RLOO) -> None:
    rewards = torch.randn(MASK.shape)
    with pytest.raises(ValueError, match="group 44 has 1 response; expected at least 2"):
        estimator(rewards, None, MASK, torch.tensor([12, -5, 12, 44, -5]), TRUNCATED)
    with pytest.raises(ValueError, match=r"groups: \[1\]; expected one id for each of 5 responses"):
        estimator(rewards, None, MASK, GROUPS[:1], TRUNCATED)


def test_every_name_has_an_estimator_that_says_what_it_needs() -> None:
    assert set(ESTIMATORS) == set(get_args(EstimatorName))
    assert all(estimator.needs in get_args(Needs) for estimator in ESTIMATORS.values())
    assert ESTIMATORS["gae"](gamma=0.9, lam=0.8) == GAE(0.9, 0.8)
