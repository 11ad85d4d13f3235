"""Preference losses and metrics against numpy."""

import math

import numpy as np
import pytest
import torch

from nemo_eppo.algorithms.preference import bradley_terry_loss, preference_metrics, sequence_score


def test_bradley_terry_follows_its_definition() -> None:
    chosen, rejected = [1.0, -0.5, 3.0], [0.2, 0.7, 3.0]
    margins = [0.0, 0.5, 1.0]
    expected = 0.0
    for w, r, m in zip(chosen, rejected, margins, strict=True):
        p = 1 / (1 + math.exp(-(w - r - m)))
        expected += -0.9 * math.log(p) - 0.1 * math.log(1 - p) + 0.01 * (w * w + r * r) / 2
    loss = bradley_terry_loss(
        torch.tensor(chosen, dtype=torch.float64),
        torch.tensor(rejected, dtype=torch.float64),
        margin=torch.tensor(margins, dtype=torch.float64),
        label_smoothing=0.1,
        l2=0.01,
        denominator=6,
    )
    assert float(loss) == pytest.approx(expected / 6, rel=1e-12)


def test_bradley_terry_gradients_match_finite_differences() -> None:
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(
        lambda w, r: bradley_terry_loss(w, r, margin=0.3, label_smoothing=0.1, l2=0.1, denominator=5),
        (chosen, rejected),
    )


def test_bradley_terry_is_stable_for_hopeless_pairs() -> None:
    loss = bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0]), denominator=1)
    assert float(loss) == 1000


@pytest.mark.parametrize("how", ["last", "sum", "mean"])
def test_a_sequence_score_reads_response_tokens_only(how: str) -> None:
    scores = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    prompts, lengths = torch.tensor([2, 1, 5]), torch.tensor([6, 9, 6])
    result = sequence_score(scores, prompts, lengths, how)  # type: ignore[arg-type]
    for b in range(3):
        response = scores[b, prompts[b] : lengths[b]]
        torch.testing.assert_close(result[b], response[-1] if how == "last" else getattr(response, how)())
    result.sum().backward()
    assert scores.grad is not None
    inside = torch.tensor([[p <= s < n for s in range(9)] for p, n in zip(prompts, lengths, strict=True)])
    assert not scores.grad[~inside].any()


def test_a_sample_without_response_has_no_score() -> None:
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        sequence_score(torch.ones(2, 4), torch.tensor([1, 3]), torch.tensor([3, 3]), "mean")


def test_preference_metrics_match_numpy() -> None:
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(0.5, 2, 500), rng.normal(0, 1, 500)
    chosen[0] = rejected[0]
    lengths = rng.integers(1, 50, (2, 500))
    metrics = preference_metrics(
        torch.from_numpy(chosen), torch.from_numpy(rejected), torch.from_numpy(lengths[0]), torch.from_numpy(lengths[1])
    )
    both = np.concatenate([chosen, rejected])
    expected = {
        "accuracy": ((chosen > rejected).sum() + 0.5) / 500,
        "margin": (chosen - rejected).mean(),
        "mean": both.mean(),
        "std": both.std(),
        "chosen_mean": chosen.mean(),
        "chosen_std": chosen.std(),
        "rejected_mean": rejected.mean(),
        "rejected_std": rejected.std(),
        "length_correlation": np.corrcoef(both, lengths.reshape(-1))[0, 1],
    }
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    hit = np.where(chosen == rejected, 0.5, chosen > rejected)
    expected["ece"] = sum(
        abs(hit[inside].mean() - confidence[inside].mean()) * inside.sum() / 500
        for low in np.arange(0.5, 1, 0.05)
        if (inside := (confidence >= low) & (confidence < low + 0.05)).any()
    )
    assert metrics == pytest.approx(expected)


def test_constant_lengths_have_no_correlation() -> None:
    chosen, rejected, lengths = torch.randn(8), torch.randn(8), torch.full((8,), 5)
    assert preference_metrics(chosen, rejected, lengths, lengths)["length_correlation"] == 0
