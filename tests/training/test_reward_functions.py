"""The user's reward functions are asked by one rank, for they may be slow, cost money, or never say the same twice."""

import sys
from pathlib import Path

import torch
from distributed import run_ranks

from nemo_eppo.megatron import runtime
from nemo_eppo.rewards.functions import FunctionPool
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.settings.rewards import FunctionsConfig, RewardSourceConfig
from nemo_eppo.training.reward_sources import FunctionSource

sys.path.insert(0, str(Path(__file__).parents[1] / "rewards"))  # the user's own module


def asked() -> list[list[float]]:
    runtime.initialize(ParallelConfig(), 1)
    pool = FunctionPool(FunctionsConfig())
    name = "own_functions:rank"
    source = FunctionSource(RewardSourceConfig(function=name, weight=0.5, mean=1.0, std=2.0), name, pool)
    completion = Completion([1], torch.zeros(1), FinishReason.STOP, 1)
    batch = RolloutBatch.from_completions([[2], [3]], [completion] * 2, 0)
    samples = [Sample(prompt="a", response="", token_ids=(1,), finished=True)] * 2
    found = source.ask(batch, samples)()
    pool.close()
    assert found.latents.shape == (2, 0)
    [column] = source.columns
    assert (column.weight, column.mean, column.std, column.is_model) == (0.5, 1.0, 2.0, False)
    rewards: list[list[float]] = found.rewards.tolist()
    return rewards


def test_every_rank_has_what_rank_0_was_told() -> None:
    assert run_ranks(asked, 2) == [[[0.0], [0.0]], [[0.0], [0.0]]]
