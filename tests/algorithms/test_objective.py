"""The policy's objective against plain torch, one response at a time, without masks, shares or micro-batches."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_eppo.algorithms.masking import response_mask
from nemo_eppo.algorithms.objective import PolicyObjective

PROMPTS, LENGTHS, S = torch.tensor([3, 1, 5, 2]), torch.tensor([8, 9, 6, 7]), 9
MASK = response_mask(PROMPTS, LENGTHS, S)
TOKENS, SEQUENCES, LONGEST = int(MASK.sum()), len(MASK), 10

TERMS: dict[str, dict[str, Any]] = {
    "surrogate": {},
    "dual_clip": {"dual_clip": 1.2},
    "entropy": {"entropy_coefficient": 0.3},
    "k1": {"kl_coefficient": 0.4, "kl_estimator": "k1"},
    "k2": {"kl_coefficient": 0.4, "kl_estimator": "k2"},
    "k3": {"kl_coefficient": 0.4, "kl_estimator": "k3"},
    "kl": {"divergence": "kl", "divergence_weight": 0.5},
    "chi2": {"divergence": "chi2", "divergence_weight": 0.6},
    "all": {
        "dual_clip": 1.2,
        "entropy_coefficient": 0.3,
        "kl_coefficient": 0.4,
        "kl_estimator": "k3",
        "divergence": "chi2",
        "divergence_weight": 0.6,
    },
}


def objective(aggregation: str = "token", **terms: Any) -> PolicyObjective:
    sizes = {"tokens": float(TOKENS), "sequences": SEQUENCES, "longest": LONGEST}
    return PolicyObjective(clip_low=0.2, clip_high=0.3, aggregation=aggregation, **sizes, **terms)  # type: ignore[arg-type]


def rollout() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """logprobs and entropies, with gradients, and all rows; what is no response is NaN."""
    generator = torch.Generator().manual_seed(3)
    logprobs, entropies, old, advantages, weights, ref = torch.where(
        MASK, torch.randn(6, *MASK.shape, dtype=torch.float64, generator=generator), torch.nan
    )
    rows = {
        "mask": MASK,
        "old_logprobs": logprobs + 0.4 * old,
        "advantages": advantages,
        "weights": weights.abs(),
        "ref_logprobs": logprobs + 0.3 * ref,
    }
    return logprobs.requires_grad_(), entropies.requires_grad_(), rows


def plainly(
    logprobs: Tensor, entropies: Tensor, rows: dict[str, Tensor], aggregation: str, terms: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the report of the whole mini-batch, from lists of responses of different lengths."""

    def responses(x: Tensor) -> list[Tensor]:
        return [row[int(p) - 1 : int(n) - 1] for row, p, n in zip(x, PROMPTS, LENGTHS, strict=True)]

    def mean(per_token: list[Tensor]) -> Tensor:
        if aggregation == "token":
            return torch.cat(per_token).mean()
        if aggregation == "sequence":
            return torch.stack([x.mean() for x in per_token]).mean()
        return torch.stack([x.sum() / LONGEST for x in per_token]).mean()

    logp, entropy = responses(logprobs), responses(entropies)
    log_ratios = [a - b for a, b in zip(logp, responses(rows["old_logprobs"]), strict=True)]
    surrogate, clipped = [], []
    for log_ratio, advantage, weight in zip(
        log_ratios, responses(rows["advantages"]), responses(rows["weights"]), strict=True
    ):
        ratio, gain = log_ratio.exp(), []
        for rho, a in zip(ratio, advantage, strict=True):
            gain.append(torch.min(a * rho, a * rho.clamp(0.8, 1.3)))
            bound = terms.get("dual_clip", torch.inf)
            clipped.append(bool((a > 0 and rho > 1.3) or (a < 0 and not 0.8 <= rho <= bound)))
            if a < 0 and "dual_clip" in terms:
                gain[-1] = torch.max(gain[-1], terms["dual_clip"] * a)
        surrogate.append(-weight * torch.stack(gain))
    loss = mean(surrogate)
    every = torch.cat(log_ratios).detach()
    report = {
        "clip_fraction": torch.tensor(clipped).double().mean(),
        "approx_kl": (every.exp() - 1 - every).mean(),
        "ratio_mean": every.exp().mean(),
        "entropy": torch.cat(entropy).mean().detach(),
    }
    if "entropy_coefficient" in terms:
        loss = loss - terms["entropy_coefficient"] * mean(entropy)
    from_reference = [a - b for a, b in zip(logp, responses(rows["ref_logprobs"]), strict=True)]
    if "kl_coefficient" in terms:
        estimate = {"k1": lambda x: x, "k2": lambda x: x**2 / 2, "k3": lambda x: (-x).exp() - 1 + x}
        kl = terms["kl_coefficient"] * mean([estimate[terms["kl_estimator"]](x) for x in from_reference])
        loss, report["kl_loss"] = loss + kl, kl.detach()
    if "divergence" in terms:
        total = torch.stack([x.sum() for x in from_reference])
        assert total.abs().max() < 10  # no tail
        size = total + (-total).exp() - 1 if terms["divergence"] == "kl" else total.exp() + (-total).exp() - 2
        penalty = terms["divergence_weight"] * size.mean()
        loss, report["divergence_loss"] = loss + penalty, penalty.detach()
    return loss, report


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("terms", TERMS)
def test_loss_report_and_gradients_are_those_of_plain_torch(terms: str, aggregation: str) -> None:
    logprobs, entropies, rows = rollout()
    loss, report = objective(aggregation, **TERMS[terms])(logprobs, entropies, rows)
    expected, expected_report = plainly(logprobs, entropies, rows, aggregation, TERMS[terms])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(report, expected_report)
    assert 0 < report["clip_fraction"] < 1
    assert not any(x.requires_grad for x in report.values())
    gradients, wanted = (torch.autograd.grad(x, (logprobs, entropies), allow_unused=True) for x in (loss, expected))
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (exact is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, exact)
            assert gradient[MASK].abs().max() > 0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "fixed"])
@pytest.mark.parametrize("parts", [[[2], [0, 3], [1]], [[0, 2, 3], [1]]])
def test_micro_batches_of_any_width_add_up_to_the_whole(aggregation: str, parts: list[list[int]]) -> None:
    logprobs, entropies, rows = rollout()
    whole = objective(aggregation, **TERMS["all"])
    loss, report = whole(logprobs, entropies, rows)
    shares = []
    for part in parts:
        width = int(LENGTHS[part].max()) - 1  # no wider than its longest response
        cropped = {name: x[part, :width] for name, x in rows.items()}
        shares.append(whole(logprobs[part, :width], entropies[part, :width], cropped))
    split = torch.stack([share for share, _ in shares]).sum()
    torch.testing.assert_close(split, loss)
    for name in report:
        torch.testing.assert_close(torch.stack([share[name] for _, share in shares]).sum(), report[name])
    torch.testing.assert_close(
        torch.autograd.grad(split, (logprobs, entropies)), torch.autograd.grad(loss, (logprobs, entropies))
    )


@pytest.mark.parametrize("terms", TERMS)
def test_gradients_match_finite_differences(terms: str) -> None:
    logprobs, entropies, rows = rollout()
    inside = [x[MASK].detach().requires_grad_() for x in (logprobs, entropies)]

    def loss(*flat: Tensor) -> Tensor:
        logprobs, entropies = (torch.zeros(MASK.shape, dtype=torch.float64).masked_scatter(MASK, x) for x in flat)
        return objective("sequence", **TERMS[terms])(logprobs, entropies, rows)[0]

    assert torch.autograd.gradcheck(loss, inside)


def test_without_weights_sampling_is_not_corrected() -> None:
    logprobs, entropies, rows = rollout()
    ones = objective()(logprobs, entropies, rows | {"weights": torch.ones(MASK.shape)})
    without = objective()(logprobs, entropies, {k: v for k, v in rows.items() if k not in ("weights", "ref_logprobs")})
    assert torch.equal(ones[0], without[0])
    assert not torch.equal(objective()(logprobs, entropies, rows)[0], without[0])


def test_a_divergence_of_weight_zero_is_still_reported() -> None:
    # the square root of chi2 has slope zero near the reference; its curve in a report should have no holes
    report = objective(divergence="chi2", divergence_weight=0.0)(*rollout())[1]
    assert report["divergence_loss"] == 0
    assert "divergence_loss" not in objective()(*rollout())[1]


def test_the_square_root_of_chi2_is_a_weight_and_not_a_divergence() -> None:
    with pytest.raises(ValueError, match="divergence: 'sqrt_chi2'; expected 'none', 'kl' or 'chi2'"):
        objective(divergence="sqrt_chi2")
