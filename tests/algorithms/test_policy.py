"""PPO's losses against scalar loops, finite differences, and the promise that the split into micro-batches is free."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import Aggregation
from nemo_eppo.algorithms.masking import response_mask
from nemo_eppo.algorithms.policy import (
    PolicyStats,
    aggregate,
    explained_variance,
    policy_loss,
    truncated_importance_weights,
    value_loss,
)

MASK = response_mask(torch.tensor([3, 1, 5, 2]), torch.tensor([8, 9, 6, 7]), 9)
TOKENS, SEQUENCES = int(MASK.sum()), len(MASK)
DENOMINATORS = {"token": TOKENS, "sequence": SEQUENCES, "fixed": SEQUENCES * 10}


def rollout(scale: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, old_logprobs, advantages: [B, T] fp64."""
    generator = torch.Generator().manual_seed(3)
    logprobs, noise, advantages = torch.randn(3, *MASK.shape, dtype=torch.float64, generator=generator)
    return logprobs, logprobs + scale * noise, advantages


def scalar_loss(logprob: float, old: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    ratio = math.exp(logprob - old)
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - low), 1 + high))
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@pytest.mark.parametrize("dual", [None, 1.2])
@pytest.mark.parametrize("aggregation", DENOMINATORS)
def test_policy_loss_follows_its_definition(aggregation: Any, dual: float | None) -> None:
    logprobs, old, advantages = rollout()
    total = 0.0
    for b in range(SEQUENCES):
        row = [
            scalar_loss(float(logprobs[b, t]), float(old[b, t]), float(advantages[b, t]), 0.2, 0.3, dual)
            for t in range(MASK.shape[1])
            if MASK[b, t]
        ]
        total += sum(row) / (SEQUENCES * len(row) if aggregation == "sequence" else DENOMINATORS[aggregation])
    loss, _ = policy_loss(
        logprobs,
        old,
        advantages,
        MASK,
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=dual,
        aggregation=aggregation,
        denominator=DENOMINATORS[aggregation],
    )
    assert float(loss) == pytest.approx(total, rel=1e-12)


def test_policy_stats_follow_their_definitions() -> None:
    logprobs, old, advantages = rollout()
    _, stats = policy_loss(logprobs, old, advantages, MASK, clip_low=0.2, clip_high=0.3, denominator=TOKENS)
    log_ratio, advantage = (logprobs - old)[MASK], advantages[MASK]
    ratio = log_ratio.exp()
    clipped = ((advantage > 0) & (ratio > 1.3)) | ((advantage < 0) & (ratio < 0.8))
    assert 0 < int(stats.clipped) == int(clipped.sum())
    torch.testing.assert_close(stats.ratio, ratio.sum())
    torch.testing.assert_close(stats.approx_kl, ((ratio - 1) - log_ratio).sum())


@pytest.mark.parametrize("log_ratio", [1e-4, -1e-4])
def test_the_kl_of_a_small_update_is_no_rounding_noise(log_ratio: float) -> None:
    logprobs, zeros = torch.full(MASK.shape, log_ratio), torch.zeros(MASK.shape)
    _, stats = policy_loss(logprobs, zeros, zeros, MASK, clip_low=0.2, clip_high=0.2, denominator=TOKENS)
    assert float(stats.approx_kl) / TOKENS == pytest.approx(5e-9, rel=0.01)


def test_tokens_that_dual_clip_binds_are_counted_as_clipped() -> None:
    ratios, advantages = torch.tensor([[2.0, 4.0, 0.5, 1.0, 2.0]]), torch.tensor([[-1.0, -1.0, -1.0, -1.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    clipped = [
        int(
            policy_loss(
                ratios.log(),
                torch.zeros(1, 5),
                advantages,
                mask,
                clip_low=0.2,
                clip_high=0.2,
                dual_clip=dual,
                denominator=5,
                importance_weights=torch.full((1, 5), 0.5),
            )[1].clipped
        )
        for dual in (None, 3.0)
    ]
    assert clipped == [2, 3]


@pytest.mark.parametrize("aggregation", DENOMINATORS)
def test_micro_batches_add_up_to_the_loss_and_gradient_of_the_batch(aggregation: Any) -> None:
    logprobs, old, advantages = rollout()
    logprobs.requires_grad_()
    weights = torch.rand(MASK.shape, dtype=torch.float64)
    options: dict[str, Any] = {
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": 3.0,
        "aggregation": aggregation,
        "denominator": DENOMINATORS[aggregation],
    }
    whole, stats = policy_loss(logprobs, old, advantages, MASK, importance_weights=weights, **options)
    parts = [
        policy_loss(logprobs[i], old[i], advantages[i], MASK[i], importance_weights=weights[i], **options)
        for i in (torch.tensor([2]), torch.tensor([0, 3]), torch.tensor([1]))
    ]
    split = torch.stack([loss for loss, _ in parts]).sum()
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(torch.autograd.grad(split, logprobs), torch.autograd.grad(whole, logprobs))
    added = PolicyStats(*(torch.stack(same).sum() for same in zip(*(s for _, s in parts), strict=True)))
    torch.testing.assert_close(added, stats)


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    logprobs, _, advantages = rollout()
    logprobs.requires_grad_()
    loss, stats = policy_loss(
        logprobs, logprobs.detach(), advantages, MASK, clip_low=0.2, clip_high=0.2, denominator=TOKENS
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(gradient, torch.where(MASK, -advantages / TOKENS, 0.0))
    assert float(stats.clipped) == 0


@pytest.mark.parametrize("aggregation", DENOMINATORS)
def test_gradients_of_the_policy_loss_match_finite_differences(aggregation: Any) -> None:
    logprobs, old, advantages = rollout()

    def loss(x: Tensor) -> Tensor:
        return policy_loss(
            x,
            old,
            advantages,
            MASK,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=1.2,
            aggregation=aggregation,
            denominator=5.0,
        )[0]

    assert torch.autograd.gradcheck(loss, logprobs.requires_grad_())


def test_extreme_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[1000.0, -1000.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, stats = policy_loss(
        logprobs, torch.zeros(1, 2), -torch.ones(1, 2), mask, clip_low=0.2, clip_high=0.2, denominator=2
    )
    loss.backward()
    assert logprobs.grad is not None
    assert all(torch.isfinite(x).all() for x in (loss, logprobs.grad, *stats))


def test_only_fixed_aggregation_gives_a_token_the_same_weight_whatever_the_lengths() -> None:
    def weights(aggregation: Any, mask: Tensor) -> Tensor:
        x = torch.zeros(mask.shape, requires_grad=True)
        denominator = {"token": float(mask.sum()), "sequence": 4.0, "fixed": 40.0}[aggregation]
        return torch.autograd.grad(aggregate(x, mask, aggregation, denominator), x)[0][MASK]

    longer = MASK.clone()
    longer[2] = True  # one response is longer than before
    assert torch.equal(weights("fixed", MASK), torch.full((TOKENS,), 1 / 40))
    assert torch.equal(weights("fixed", longer), weights("fixed", MASK))
    assert not torch.equal(weights("token", longer), weights("token", MASK))
    assert len(weights("sequence", MASK).unique()) > 1


def test_an_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregation: 'mean'; expected"):
        aggregate(torch.zeros(MASK.shape), MASK, "mean", 1.0)  # type: ignore[arg-type]


def test_a_row_without_response_contributes_nothing() -> None:
    mask = torch.cat([MASK, torch.zeros_like(MASK[:1])])
    x = torch.randn(mask.shape)
    aggregations: tuple[Aggregation, ...] = ("token", "sequence", "fixed")
    for aggregation in aggregations:
        with_row, without = aggregate(x, mask, aggregation, 4.0), aggregate(x[:-1], MASK, aggregation, 4.0)
        torch.testing.assert_close(with_row, without)


def test_dual_clip_below_one_is_refused() -> None:
    x = torch.zeros(MASK.shape)
    with pytest.raises(ValueError, match=r"dual_clip: 0\.5"):
        policy_loss(x, x, x, MASK, clip_low=0.2, clip_high=0.2, dual_clip=0.5, denominator=1)


def test_value_loss_follows_its_definition() -> None:
    values, returns, noise = torch.randn(3, *MASK.shape, dtype=torch.float64)
    old = values + noise
    total, clipped_count = 0.0, 0
    for b, t in MASK.nonzero().tolist():
        v, o, r = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        clipped = (min(max(v, o - 0.2), o + 0.2) - r) ** 2
        total += 0.5 * max((v - r) ** 2, clipped) / TOKENS
        clipped_count += clipped > (v - r) ** 2
    loss, clipped_tokens = value_loss(values, old, returns, MASK, 0.2, TOKENS)
    assert float(loss) == pytest.approx(total, rel=1e-12)
    assert int(clipped_tokens) == clipped_count

    unclipped, clipped_tokens = value_loss(values, old, returns, MASK, None, TOKENS)
    torch.testing.assert_close(unclipped, 0.5 * (values - returns)[MASK].square().mean())
    assert float(clipped_tokens) == 0


def test_gradients_of_the_value_loss_match_finite_differences() -> None:
    values, returns, noise = torch.randn(3, *MASK.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, values.detach() + noise, returns, MASK, 0.5, 7.0)[0], values.clone().requires_grad_()
    )


def test_importance_weights_are_capped_ratios() -> None:
    old, engine = torch.randn(2, *MASK.shape, dtype=torch.float64)
    weights = truncated_importance_weights(old, engine, MASK, 1.5)
    torch.testing.assert_close(weights[MASK], (old - engine)[MASK].exp().clamp(max=1.5))
    assert not weights[~MASK].any()


def test_importance_weights_make_the_gradient_that_of_the_engine_reweighted() -> None:
    logprobs, old, advantages = rollout(scale=0.0)
    logprobs.requires_grad_()
    weights = torch.rand(MASK.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        logprobs, old, advantages, MASK, clip_low=0.2, clip_high=0.2, denominator=1, importance_weights=weights
    )
    loss.backward()
    assert weights.grad is None
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, -weights * advantages, 0.0).detach())


def test_explained_variance() -> None:
    returns = torch.randn(MASK.shape, dtype=torch.float64)
    assert float(explained_variance(returns, returns, MASK)) == 1
    constant = torch.full_like(returns, 3.0)
    assert float(explained_variance(constant, returns, MASK)) == pytest.approx(0, abs=1e-12)
    assert float(explained_variance(returns, constant, MASK)) == 0
    values = returns + 0.5 * torch.randn_like(returns)
    chosen = (returns - values)[MASK].var() / returns[MASK].var()
    assert float(explained_variance(values, returns, MASK)) == pytest.approx(1 - float(chosen))


@pytest.mark.parametrize("tokens", [3, 10, 1000])
@pytest.mark.parametrize("constant", [0.1, 0.7, 1.3, 1000.1])
def test_of_returns_that_are_equal_up_to_rounding_nothing_is_explained(constant: float, tokens: int) -> None:
    returns, mask = torch.full((2, tokens), constant), torch.ones(2, tokens, dtype=torch.bool)
    values = torch.randn(2, tokens)
    assert float(explained_variance(values, returns, mask)) == 0
    returns[0, 0] = torch.nextafter(returns[0, 0], torch.tensor(torch.inf))
    assert float(explained_variance(values, returns, mask)) == 0
