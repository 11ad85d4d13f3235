"""METHODS rule: whatever stands at masked positions changes no bit of a result, nor of a gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eppo.algorithms import advantages, divergences, energy, masking, objective, policy, preference

PROMPTS = torch.tensor([3, 1, 5, 9, 2])
LENGTHS = torch.tensor([8, 12, 6, 12, 7])  # one response fills the row, one is a single token
S = 12
MASK = masking.response_mask(PROMPTS, LENGTHS, S)
TRUNCATED = torch.tensor([True, False, True, False, False])
GROUPS = torch.tensor([7, -3, 7, -3, -3])
POLICY = {"clip_low": 0.2, "clip_high": 0.3, "denominator": 7.0}

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def clipped_policy_loss(**options: object) -> Function:
    def loss(logprobs: Tensor, old: Tensor, adv: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        value, stats = policy.policy_loss(logprobs, old, adv, MASK, importance_weights=weights, **{**POLICY, **options})  # type: ignore[arg-type]
        return value, *stats

    return loss


def estimator(make: advantages.AdvantageEstimator) -> Function:
    def estimate(rewards: Tensor, values: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(x for x in make(rewards, values, MASK, GROUPS, TRUNCATED) if x is not None)

    return estimate


def bootstrapped(rewards: Tensor, values: Tensor) -> Tensor | tuple[Tensor, ...]:
    after = torch.where(TRUNCATED, 0.5, math.nan)  # stands outside the mask, and counts for truncated responses only
    wide = torch.cat([values, values[:, :1]], dim=1).scatter(1, LENGTHS[:, None] - 1, after[:, None])
    return estimator(advantages.GAE(0.9, 0.8, whiten=False, bootstrap_truncated=True))(rewards, wide)


def policy_objective(**options: Any) -> Function:
    terms: dict[str, Any] = {
        "entropy_coefficient": 0.1,
        "kl_coefficient": 0.2,
        "divergence": "chi2",
        "divergence_weight": 0.3,
    }
    make = objective.PolicyObjective(
        clip_low=0.2, clip_high=0.3, tokens=7.0, sequences=5, longest=12, **{**terms, **options}
    )

    def loss(logprobs: Tensor, entropies: Tensor, old: Tensor, adv: Tensor, weights: Tensor, ref: Tensor) -> Any:
        rows = {"mask": MASK, "old_logprobs": old, "advantages": adv, "weights": weights, "ref_logprobs": ref}
        value, report = make(logprobs, entropies, rows)
        return value, *report.values()

    return loss


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor) -> tuple[Tensor, ...]:
    return policy.value_loss(values, old, returns, MASK, 0.2, 7.0)


def mean_energy(x: Tensor) -> Tensor:
    return energy.response_energy(torch.stack([x, 2 * x], dim=-1), MASK, max_tokens=3)


CASES: dict[str, tuple[int, Function]] = {
    "zero_outside": (1, lambda x: masking.zero_outside(x, MASK)),
    "masked_sum": (1, lambda x: masking.masked_sum(x, MASK)),
    "masked_sum_rows": (1, lambda x: masking.masked_sum(x, MASK, dim=1)),
    "masked_mean": (1, lambda x: masking.masked_mean(x, MASK)),
    "masked_mean_rows": (1, lambda x: masking.masked_mean(x, MASK, dim=1)),
    "whiten": (1, lambda x: masking.whiten(x, MASK)),
    "GAE": (2, estimator(advantages.GAE(0.9, 0.8))),
    "GAE_not_whitened": (2, estimator(advantages.GAE(0.9, 0.8, whiten=False))),
    "GAE_bootstrapped": (2, bootstrapped),
    "GRPO": (1, estimator(advantages.GRPO())),
    "Dr. GRPO": (1, estimator(advantages.GRPO(normalize_std=False))),
    "RLOO": (1, estimator(advantages.RLOO())),
    "REINFORCE++": (1, estimator(advantages.ReinforcePlusPlus(0.9))),
    "ReMax": (2, estimator(advantages.ReMax())),
    **{f"objective_{x}": (6, policy_objective(aggregation=x)) for x in ("token", "sequence", "fixed")},
    **{f"objective_{x}": (6, policy_objective(kl_estimator=x)) for x in ("k2", "k3")},
    "objective_sequence_kl": (6, policy_objective(divergence="kl")),
    "policy_loss_token": (4, clipped_policy_loss(aggregation="token")),
    "policy_loss_sequence": (4, clipped_policy_loss(aggregation="sequence")),
    "policy_loss_dual_clip": (4, clipped_policy_loss(dual_clip=1.5)),
    "value_loss": (3, clipped_value_loss),
    "importance_weights": (2, lambda a, b: policy.truncated_importance_weights(a, b, MASK, 2.0)),
    "explained_variance": (2, lambda v, r: policy.explained_variance(v, r, MASK)),
    "aggregate_token": (1, lambda x: policy.aggregate(x, MASK, "token", 5.0)),
    "aggregate_sequence": (1, lambda x: policy.aggregate(x, MASK, "sequence", 5.0)),
    "aggregate_fixed": (1, lambda x: policy.aggregate(x, MASK, "fixed", 60.0)),
    "k1": (2, lambda a, b: divergences.kl_estimate(a, b, MASK, "k1")),
    "k2": (2, lambda a, b: divergences.kl_estimate(a, b, MASK, "k2")),
    "k3": (2, lambda a, b: divergences.kl_estimate(a, b, MASK, "k3")),
    "sequence_divergence": (2, lambda a, b: tuple(divergences.sequence_divergence(a, b, MASK))),
    "response_energy": (1, mean_energy),
    **{
        f"sequence_score_{how}": (
            1,
            lambda x, how=how: preference.sequence_score(_at_positions(x), PROMPTS, LENGTHS, how),
        )
        for how in ("last", "sum", "mean")
    },
}


def _at_positions(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x], dim=1)  # a first column, which is always prompt


def run(function: Function, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = list(result) if isinstance(result, tuple) else [result]
    weighted = [(o * torch.linspace(1, 2, o.numel()).view(o.shape)).sum() for o in outputs if o.requires_grad]
    if weighted:
        torch.stack(weighted).sum().backward()
    return [o.detach() for o in outputs], [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e9])
@pytest.mark.parametrize("name", CASES)
def test_what_stands_at_masked_positions_changes_no_bit(name: str, poison: float) -> None:
    count, function = CASES[name]
    generator = torch.Generator().manual_seed(count)
    inputs = [torch.randn(MASK.shape, generator=generator) for _ in range(count)]
    outputs, gradients = run(function, inputs)
    fuzzed_outputs, fuzzed_gradients = run(function, [torch.where(MASK, x, poison) for x in inputs])
    assert all(torch.isfinite(o).all() for o in outputs)
    for clean, fuzzed in zip(outputs, fuzzed_outputs, strict=True):
        assert torch.equal(clean, fuzzed)
    for gradient, fuzzed_gradient in zip(gradients, fuzzed_gradients, strict=True):
        if gradient is None:
            assert fuzzed_gradient is None
            continue
        assert fuzzed_gradient is not None
        assert torch.equal(gradient, fuzzed_gradient)
        assert not gradient[~MASK].any()


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("sequence_score")])
def test_nan_inside_the_mask_is_never_hidden(name: str) -> None:
    count, function = CASES[name]
    for poisoned in range(count):
        inputs = [torch.randn(MASK.shape) for _ in range(count)]
        inputs[poisoned][1, 2] = math.nan
        outputs, _ = run(function, inputs)
        assert any(torch.isnan(o).any() for o in outputs), f"input {poisoned}"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e9])
def test_of_the_values_after_the_last_action_only_those_of_truncated_responses_are_read(poison: float) -> None:
    rewards, values = torch.randn(MASK.shape), torch.randn(5, S)
    read = torch.nn.functional.pad(MASK, (0, 1))
    read[TRUNCATED, LENGTHS[TRUNCATED] - 1] = True
    gae = advantages.GAE(0.9, 0.8, bootstrap_truncated=True)
    clean = gae(rewards, values, MASK, GROUPS, TRUNCATED)
    fuzzed = gae(rewards, torch.where(read, values, poison), MASK, GROUPS, TRUNCATED)
    assert all(torch.equal(a, b) for a, b in zip(clean, fuzzed, strict=True))
    for b in TRUNCATED.nonzero().flatten():
        changed = values.clone()
        changed[b, LENGTHS[b] - 1] += 1
        assert not torch.equal(gae(rewards, changed, MASK, GROUPS, TRUNCATED)[1][b], clean[1][b])
