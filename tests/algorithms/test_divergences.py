"""KL estimators against the exact divergence of categorical distributions."""

import math
from typing import Any

import pytest
import torch

from nemo_eppo.algorithms.divergences import divergence_slope, kl_estimate, sequence_divergence


def categorical(seed: int) -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(kind: str) -> None:
    policy, reference = categorical(0), categorical(1)
    mask = torch.ones(1, 40, dtype=torch.bool)
    estimates = kl_estimate(policy[None], reference[None], mask, kind)[0]  # type: ignore[arg-type]
    exact = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_k2_and_k3_are_never_negative(kind: str) -> None:
    logprobs, ref_logprobs = 3 * torch.randn(2, 5, 100)
    assert (kl_estimate(logprobs, ref_logprobs, torch.ones(5, 100, dtype=torch.bool), kind) >= 0).all()  # type: ignore[arg-type]


def test_k2_is_half_the_square() -> None:
    x, mask = torch.tensor([[0.5, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert kl_estimate(x, torch.zeros(1, 2), mask, "k2").tolist() == [[0.125, 2.0]]


@pytest.mark.parametrize(("kind", "forward"), [("k2", True), ("k3", False)])
def test_the_gradient_as_a_loss_is_that_of_the_documented_divergence(kind: str, forward: bool) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    reference, mask = categorical(3), torch.ones(1, 40, dtype=torch.bool)
    policy = logits.log_softmax(0)
    loss = (policy.exp().detach() * kl_estimate(policy[None], reference[None], mask, kind)[0]).sum()  # type: ignore[arg-type]
    first, second = (policy, reference) if forward else (reference, policy)
    exact = (first.exp() * (first - second)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(exact, logits))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_infinite_ratios_are_clamped_to_twenty(kind: str) -> None:
    infinite = torch.tensor([[torch.inf, -torch.inf]])
    twenty = torch.tensor([[20.0, -20.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    clamped = kl_estimate(infinite, torch.zeros(1, 2), mask, kind)  # type: ignore[arg-type]
    assert torch.isfinite(clamped).all()
    assert torch.equal(clamped, kl_estimate(twenty, torch.zeros(1, 2), mask, kind))  # type: ignore[arg-type]


ONE = torch.ones(40, 1, dtype=torch.bool)


def test_sequence_estimates_are_the_documented_formulas() -> None:
    logprobs, ref_logprobs = (3 * torch.randn(2, 30, 6, dtype=torch.float64)).unbind()
    mask = torch.rand(30, 6) < 0.7
    found = sequence_divergence(logprobs, ref_logprobs, mask)
    for i in range(30):
        total = float(((logprobs - ref_logprobs)[i] * mask[i]).sum())
        rho = math.expm1(total) if total < 10 else math.exp(10) * (1 + total - 10) - 1
        iota = math.expm1(-total) if total > -10 else math.exp(10) * (1 - total - 10) - 1
        assert float(found.log_ratio[i]) == pytest.approx(total)
        assert float(found.ratio[i]) == pytest.approx(rho)
        assert float(found.kl[i]) == pytest.approx(total + iota)
        assert float(found.chi2[i]) == pytest.approx(rho + iota)
    assert found.log_ratio.abs().max() > 10  # the tails were needed
    assert (found.kl >= 0).all()
    assert (found.chi2 >= 0).all()


def test_sequence_estimates_are_unbiased() -> None:
    policy, reference = categorical(0), categorical(1)
    found = sequence_divergence(policy[:, None], reference[:, None], ONE)
    kl = (policy.exp() * (policy - reference)).sum()
    chi2 = ((policy.exp() - reference.exp()).square() / reference.exp()).sum()
    for estimate, exact in ((found.log_ratio, kl), (found.kl, kl), (found.ratio, chi2), (found.chi2, chi2)):
        torch.testing.assert_close((policy.exp() * estimate).sum(), exact)


def test_the_gradients_as_losses_and_as_rewards_are_those_of_the_documented_divergences() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    reference, policy = categorical(3), logits.log_softmax(0)
    sampled = policy.exp().detach()
    found = sequence_divergence(policy[:, None], reference[:, None], ONE)
    chi2 = ((policy.exp() - reference.exp()).square() / reference.exp()).sum()
    forward, reverse = (policy.exp() * (policy - reference)).sum(), (reference.exp() * (reference - policy)).sum()
    for surrogate, exact in (
        (sampled * found.kl, reverse),
        (sampled * found.chi2, chi2 / 2 + reverse),
        (sampled * found.log_ratio.detach() * policy, forward),
        (sampled * found.ratio.detach() * policy, chi2 / 2),
    ):
        gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (surrogate, exact)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["kl", "chi2", "sqrt_chi2"])
@pytest.mark.parametrize("parts", [[12], [5, 7], [1, 2, 4, 5]])
def test_no_micro_batch_changes_the_gradient(kind: Any, parts: list[int]) -> None:
    mask = torch.rand(12, 5) < 0.8
    ref_logprobs = torch.randn(12, 5, dtype=torch.float64)
    logprobs = (ref_logprobs + 0.3 * torch.randn(12, 5, dtype=torch.float64)).requires_grad_()
    whole = sequence_divergence(logprobs, ref_logprobs, mask)
    slope = divergence_slope(whole.chi2.mean().item(), kind)
    penalty = whole.kl.mean() if kind == "kl" else whole.chi2.mean()
    if kind == "sqrt_chi2":
        penalty = penalty.clamp(min=1e-4).sqrt()
    (exact,) = torch.autograd.grad(penalty, logprobs)

    for x, r, m in zip(logprobs.split(parts), ref_logprobs.split(parts), mask.split(parts), strict=True):
        found = sequence_divergence(x, r, m)
        (slope * (found.kl if kind == "kl" else found.chi2).sum() / 12).backward()
    torch.testing.assert_close(logprobs.grad, exact)
    assert exact.abs().max() > 0


def test_the_square_root_is_not_followed_to_where_its_slope_is_infinite() -> None:
    assert divergence_slope(0.0, "sqrt_chi2") == divergence_slope(1e-4, "sqrt_chi2") == 0
    assert divergence_slope(0.25, "sqrt_chi2") == 1
    assert divergence_slope(0.0, "chi2") == 1


def test_sequence_gradients_agree_with_differences_and_stay_finite_in_the_tails() -> None:
    reference, mask = torch.zeros(7, 1, dtype=torch.float64), torch.ones(7, 1, dtype=torch.bool)
    x = torch.tensor([-15.0, -9.9, -1, 0, 1, 9.9, 15], dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(sequence_divergence(x, reference, mask)), x, rtol=1e-6)
    extreme = torch.tensor([[1e30], [-torch.inf]], requires_grad=True)
    found = sequence_divergence(extreme, torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool))
    found.chi2.sum().backward()
    assert extreme.grad is not None
    assert torch.isfinite(extreme.grad).all()
