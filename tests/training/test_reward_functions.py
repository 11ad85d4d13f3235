"""The user's reward functions are asked by one rank, for they may be slow, cost money, or never say the same twice. A
run that one of them ends loses no step."""

import json
import sys
from pathlib import Path

import torch
from distributed import run_ranks
from jobs import Job, Models, read_weights

from nemo_eppo.megatron import runtime
from nemo_eppo.models import checkpoint_files
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


def test_a_failed_function_loses_no_step_and_the_policy_waits_for_its_critic(models: Models, tmp_path: Path) -> None:
    values = {
        "model": {"restore_from_path": models.sft, "parallel": {"tensor_model_parallel_size": 2}},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {"max_steps": 10, "rollout_batch_size": 8, "mini_batch_size": 4, "critic_warmup_steps": 1},
        "critic": {"colocated": {"restore_from_path": models.rm, "optimizer": {"lr": 1e-3}}},
        "rewards": [{"function": "own_functions:fails_at_the_17th"}],
        "shaping": {"kl": {"coefficient": 0.1, "controller": "adaptive", "target": 1.0, "horizon": 40}},
        "optimizer": {"lr": 1e-3, "schedule": "linear"},
        "checkpoint": {"interval": 0},
    }
    job = Job("actor", 2, values, tmp_path / "run")
    assert job.wait(240) == 1
    log = job.log.read_text()
    assert "reward function own_functions:fails_at_the_17th, response 0 of the batch" in log
    assert log.count("ConnectionError: 502 Bad Gateway") == 1
    [saved] = checkpoint_files.complete_in(tmp_path / "run" / "checkpoints")
    assert checkpoint_files.read_manifest(saved).step == 2

    first, second = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "critic/grad_norm" in first
    assert not any(name.startswith("actor/") for name in first)
    assert first["kl/coefficient"] == second["kl/coefficient"] == 0.1  # which no KL of a policy that waits can lower
    assert second["kl/policy_reference"] == 0  # it generated with the SFT model's weights still
    assert second["actor/lr"] == 1e-3 * (1 - 0.5 / 18)  # the mean of its first two of 18 updates, the schedule's first
    [weights] = run_ranks(read_weights, 1, saved, models.config, "lm")
    assert any(not torch.equal(weights[name], before) for name, before in models.policy.items())
