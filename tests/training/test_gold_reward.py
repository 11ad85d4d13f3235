"""The user's gold reward is asked by one rank, for it may be slow, cost money, or never say the same twice."""

import logging
from pathlib import Path

import torch.distributed as dist
from distributed import run_ranks
from jobs import Models

from nemo_eppo.config import load_config
from nemo_eppo.megatron import runtime
from nemo_eppo.observability.run import ExpManagerConfig, Run
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.training.ppo_config import PPOConfig
from nemo_eppo.training.ppo_job import PPOJob


def asked(models: Models, directory: Path) -> list[float]:
    values = {
        "model": {"restore_from_path": models.sft},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {"max_steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8},
    }
    job = PPOJob(load_config(PPOConfig, values), Run(directory, 0, logging.getLogger(), ExpManagerConfig()))
    runtime.initialize(job.config.model.parallel, 1)
    job.gold = lambda prompt, response, finished: float(dist.get_rank())
    completion = Completion([1], [0.0], FinishReason.STOP, 1)
    return job._gold(["a", "b"], [completion, completion])


def test_every_rank_has_what_rank_0_was_told(models: Models, tmp_path: Path) -> None:
    assert run_ranks(asked, 2, models, tmp_path) == [[0.0, 0.0], [0.0, 0.0]]
