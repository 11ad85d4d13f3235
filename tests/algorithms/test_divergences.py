"""KL estimators against the exact divergence of categorical distributions."""

import pytest
import torch

from nemo_eppo.algorithms.divergences import kl_estimate


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
