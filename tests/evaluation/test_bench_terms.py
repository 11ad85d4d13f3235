"""The bench's controls of the energy penalty, and its own terms, by hand: a few responses, energies of two modules."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_eppo.config import load_config
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.shaping import ShapingConfig

ETA = 2.0
Shape = Callable[[RewardInputs], list[float]]


def term(name: str) -> tuple[RewardPipeline, Shape]:
    """A pipeline with this term alone, and what the term gives to each response."""
    own = {"name": "own", "term": f"terms:{name}", "settings": {"eta": ETA}}
    made = RewardPipeline(load_config(ShapingConfig, {"energy_penalty": {"eta": 0}, "terms": [own]}))
    return made, lambda inputs: made(inputs).ledger.contributions["reward/own"].tolist()


def inputs(energies: Any, reference: Any, log_ratios: Any = None, step: int = 1) -> RewardInputs:
    """Responses [B] with energies [B, E]; `log_ratios` [B, 2] of two tokens each, the third action is padding."""
    size = len(energies)
    ratios = torch.tensor(log_ratios or [[0.0, 0.0]] * size)
    return RewardInputs(
        scores=torch.ones(size, 1),
        columns=[Column(name="model")],
        samples=[Sample(prompt="p", response="r", token_ids=(1, 1), finished=True)] * size,
        tokens=torch.zeros(size, 4, dtype=torch.int64),
        prompt_lengths=torch.ones(size, dtype=torch.int64),
        mask=torch.tensor([[True, True, False]] * size),
        truncated=torch.zeros(size, dtype=torch.bool),
        energies=torch.tensor(energies),
        ref_energies=torch.tensor(reference),
        logprobs=torch.cat([ratios - 1, torch.full((size, 1), math.nan)], dim=1),
        ref_logprobs=torch.full((size, 3), -1.0),
        step=step,
        max_steps=9,
    )


POLICY, REFERENCE = [[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], [[0.0, 0.0], [1.0, 3.0], [7.0, 5.0]]


def test_the_permuted_reference_is_that_of_the_response_before() -> None:
    shape = term("PermutedReference")[1]
    # |1-7|+|10-5|, |2-0|+|20-0|, |4-1|+|40-3|
    assert shape(inputs(POLICY, REFERENCE)) == pytest.approx([-ETA * 11, -ETA * 22, -ETA * 40])


def test_within_a_batch_a_shift_that_all_share_costs_nothing() -> None:
    shape = term("WithinBatch")[1]
    # rises 1, 1, -3 and 10, 17, 35, whose means are -1/3 and 62/3
    expected = [-ETA * (4 / 3 + 32 / 3), -ETA * (4 / 3 + 11 / 3), -ETA * (8 / 3 + 43 / 3)]
    assert shape(inputs(POLICY, REFERENCE)) == pytest.approx(expected)
    shifted = [[a + 100, b - 7] for a, b in POLICY]
    assert shape(inputs(shifted, REFERENCE)) == pytest.approx(expected, rel=1e-5)


def test_frozen_energies_are_the_sft_models_against_their_mean_in_the_first_step() -> None:
    made, shape = term("FrozenEnergies")
    # 0, 4 and 12 have a mean of 16/3; the policy's weights do not count
    expected = [-ETA * 16 / 3, -ETA * 4 / 3, -ETA * 20 / 3]
    assert shape(inputs(POLICY, REFERENCE)) == pytest.approx(expected)
    resumed, shape_resumed = term("FrozenEnergies")
    resumed.load_state_dict(made.state_dict())
    for each in (shape, shape_resumed):
        assert each(inputs([[0.0, 0.0]] * 3, [[9.0, 3.0]] * 3, step=2)) == pytest.approx([-ETA * (12 - 16 / 3)] * 3)


def test_the_gate_weighs_kl_by_the_mean_rise_in_deviations_of_the_first_step() -> None:
    made, shape = term("EnergyGatedKL")
    ratios, zero = [[0.5, 0.25], [-1.0, 0.5]], [[0.0, 0.0]] * 2
    assert shape(inputs([[1.0, 0.0], [2.0, 3.0]], zero, ratios)) == [0.0, 0.0], "rises 1 and 5: their own mean"
    # rises 4 and 10: mean 7, that of the first step 3 with a deviation of 2
    resumed, shape_resumed = term("EnergyGatedKL")
    resumed.load_state_dict(made.state_dict())
    for each in (shape, shape_resumed):
        risen = inputs([[3.0, 1.0], [4.0, 6.0]], zero, ratios, step=2)
        assert each(risen) == pytest.approx([-ETA * 2 * 0.75, -ETA * 2 * -0.5])
    assert shape(inputs(zero, zero, ratios, step=3)) == [0.0, 0.0], "no reward for a fall"


def test_energies_are_punished_by_the_square_above_the_running_mean_of_earlier_rises() -> None:
    made, shape = term("EnergyAboveRecent")
    zero = [[0.0, 0.0]] * 2
    assert shape(inputs([[1.0, 0.0], [2.0, 3.0]], zero)) == [0.0, 0.0], "rises 1 and 5: nothing was before"
    # deviation 2; rises 2 and 9 against the mean 3: z = -1/2 and 3
    assert shape(inputs([[2.0, 0.0], [3.0, 6.0]], zero, step=2)) == pytest.approx([0.0, -ETA * 9])
    resumed, shape_resumed = term("EnergyAboveRecent")
    resumed.load_state_dict(made.state_dict())
    usual = 0.9 * 3 + 0.1 * 5.5
    for each in (shape, shape_resumed):
        expected = [-ETA * ((rise - usual) / 2) ** 2 for rise in (5, 7)]
        assert each(inputs([[6.0, 0.0], [7.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], step=3)) == pytest.approx(expected)


def test_a_shared_rise_spreads_the_penalties_which_whitening_would_not_see_of_a_linear_one() -> None:
    spreads = []
    for shift in (0.0, 2.0):
        shape = term("EnergyAboveRecent")[1]
        shape(inputs([[1.0, 0.0], [2.0, 3.0]], [[0.0, 0.0]] * 2))
        low, high = shape(inputs([[4.0 + shift, 0.0], [5.0 + shift, 0.0]], [[0.0, 0.0]] * 2, step=2))
        spreads.append(low - high)
    assert spreads == pytest.approx([ETA * (2**2 - 1) / 4, ETA * (4**2 - 3**2) / 4])
