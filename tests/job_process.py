"""A job for tests: `job_process.py critic|reward|actor|steps|methods config.json run_directory`.

The same classes as the scripts in examples/, without NeMo's logs and configuration.
"""

import json
import logging
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from kill_switch import arm

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.entry.job import errors_end_the_job
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.observability.run import Run
from nemo_eppo.servers.transport import ServerError
from nemo_eppo.settings.critic import CriticConfig
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reward_model import RewardServerConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.training.critic import serve_critic
from nemo_eppo.training.ppo import EngineMismatchError
from nemo_eppo.training.ppo_job import PPOJob
from nemo_eppo.training.ppo_loop import PPOLoop, train_ppo
from nemo_eppo.training.reward_service import serve_reward_model

STEPS = 3


def run_steps(config: PPOConfig, run: Run) -> None:
    """Three PPO steps; everything they made, and the policy's weights, go to steps.pt."""
    job = PPOJob(config, run)
    with ExitStack() as stack:
        ppo = PPOLoop(job, job.build(stack)).ppo
        steps = []
        for step in range(1, STEPS + 1):
            result = ppo.step(step, [job.prompts[index] for index in next(job.batches)])
            steps.append({"metrics": result.metrics, "batch": result.batch, "experience": result.experience})
        policy = dict(export_tensors(ppo.policy.runner.chunks, job.plan.model))
        made: dict[str, Any] = {"steps": steps, "policy": policy}
        if ppo.critic is not None:
            made["critic"], saved = ppo.critic.save([])
            on_rank0(saved)
        if dist.get_rank() == 0:
            torch.save(made, run.directory / "steps.pt")
    runtime.shutdown()


def run_methods(methods: dict[str, dict[str, Any]], run: Run) -> None:
    """One PPO step of each method; metrics and ledger rows, or its error, to methods.json, tensors to methods.pt."""
    made: dict[str, Any] = {}
    tensors = {}
    for name, values in methods.items():
        try:
            job = PPOJob(load_config(PPOConfig, values), run)
            with ExitStack() as stack:
                ppo = job.build(stack)  # and no resume: the critic has learnt from others
                result = ppo.step(1, [job.prompts[index] for index in next(job.batches)])
            made[name] = {
                "metrics": result.metrics,
                "contributions": list(result.ledger.contributions),
                "rows": result.ledger.rows(),
            }
            tensors[name] = {"batch": result.batch, "experience": result.experience}
        except (ConfigError, EngineMismatchError, ServerError) as error:
            made[name] = {"error": str(error)}
    if run.rank == 0:
        (run.directory / "methods.json").write_text(json.dumps(made))
        torch.save(tensors, run.directory / "methods.pt")
    runtime.shutdown()


def main(kind: str, config_file: Path, directory: Path) -> None:
    torch.set_num_threads(1)
    values = json.loads(config_file.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO)
    if "kill" in values:
        arm(**values.pop("kill"))
    manager = ExpManagerConfig(**values.get("exp_manager", {}))
    run = Run(directory, int(os.environ.get("RANK", "0")), logging.getLogger(), manager)
    if kind == "critic":
        serve_critic(load_config(CriticConfig, values), run)
    elif kind == "reward":
        serve_reward_model(load_config(RewardServerConfig, values), run)
    elif kind == "actor":
        with errors_end_the_job(run.rank, directory):
            train_ppo(load_config(PPOConfig, values), run)
        runtime.shutdown()
    elif kind == "methods":
        run_methods(values, run)
    else:
        run_steps(load_config(PPOConfig, values), run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
