"""Energy windows and penalties against loops over positions, and against the authors' published energies."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_eppo.algorithms.energy import apply_floor, energy_difference, energy_window, response_energy
from nemo_eppo.algorithms.masking import response_mask

PROMPTS, LENGTHS, S = torch.tensor([3, 1, 5]), torch.tensor([8, 9, 6]), 11
AT_POSITIONS = torch.randn(3, S, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mean_energy(window: str, at_positions: torch.Tensor = AT_POSITIONS, max_tokens: int | None = None) -> torch.Tensor:
    mask = response_mask(PROMPTS, LENGTHS, at_positions.shape[1])
    return response_energy(energy_window(at_positions, window), mask, max_tokens)  # type: ignore[arg-type]


def positions(window: str, prompt: int, length: int) -> range:
    return {
        "response": range(prompt, length),
        "generating": range(prompt - 1, length - 1),
    }[window]


@pytest.mark.parametrize("window", ["response", "generating"])
def test_a_window_averages_the_documented_positions(window: str) -> None:
    for b in range(3):
        chosen = AT_POSITIONS[b, list(positions(window, int(PROMPTS[b]), int(LENGTHS[b])))]
        torch.testing.assert_close(mean_energy(window)[b], chosen.mean(0))


@pytest.mark.parametrize("window", ["response", "generating"])
def test_energy_is_independent_of_padding(window: str) -> None:
    padded = torch.nn.functional.pad(AT_POSITIONS, (0, 0, 0, 7), value=torch.nan)
    torch.testing.assert_close(mean_energy(window, padded), mean_energy(window), rtol=1e-14, atol=0)


def test_max_tokens_counts_the_first_tokens_only() -> None:
    for b in range(3):
        chosen = AT_POSITIONS[b, int(PROMPTS[b]) : min(int(LENGTHS[b]), int(PROMPTS[b]) + 2)]
        torch.testing.assert_close(mean_energy("response", max_tokens=2)[b], chosen.mean(0))


def test_an_empty_window_is_an_error() -> None:
    energy = torch.ones(2, 4, 1)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        response_energy(energy, torch.tensor([[True] * 4, [False] * 4]))


def test_the_difference_sums_over_modules_on_one_side_or_both() -> None:
    policy, reference = torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[0.5, 4.0], [0.0, 4.0]])
    assert energy_difference(policy, reference, "both").tolist() == [2.5, 1.0]
    assert energy_difference(policy, reference, "rise").tolist() == [0.5, 1.0]


def test_the_floor_never_raises_a_reward() -> None:
    reward = torch.tensor([2.0, 2.0, -2.0, -2.0])
    penalised = reward - torch.tensor([0.1, 9.0, 0.1, 9.0])
    floored = apply_floor(reward, penalised, 0.5)
    torch.testing.assert_close(floored, torch.tensor([1.9, 1.0, -2.1, -3.0]))
    assert (floored <= reward).all()


def test_published_energies_show_the_rise_on_hacked_responses() -> None:
    root = Path(__file__).parents[2]
    data = Path(os.environ.get("NEMO_EPPO_DATA", root.parent / "shared" / "data"))
    path = data / "eppo-demo" / "published_energies.csv"
    if not path.exists():
        pytest.skip(f"the authors' published energies are not at {path}; set NEMO_EPPO_DATA")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    policy, reference = (
        torch.tensor([[float(row[name])] for row in rows], dtype=torch.float64)
        for name in ("rlhf_energy_loss", "sft_energy_loss")
    )
    hacking = np.array([row["label"] == "hacking" for row in rows])
    rise = energy_difference(policy, reference, "rise").numpy()
    both = energy_difference(policy, reference, "both").numpy()
    assert (rise > 0).mean() == pytest.approx(0.975, abs=5e-4)
    assert both[hacking].mean() > 2 * both[~hacking].mean()
