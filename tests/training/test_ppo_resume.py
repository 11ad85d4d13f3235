"""An actor and a critic that are stopped and started again go on bit for bit, and refuse to go on apart."""

import json
from pathlib import Path
from typing import Any

from distributed import free_port
from jobs import Job, Models

STEPS = 4


def ppo(models: Models, reward_url: str, work: Path, name: str, steps: int, critic_work: Path) -> Job:
    """Run critic and actor up to step `steps` in the run directories under `work`."""
    port = free_port()
    critic = Job("critic", 1, critic_settings(models, port), work / f"{name}_critic", critic_work)
    try:
        actor = Job("actor", 2, actor_settings(models, reward_url, port, steps), work / name, work / "actor")
        actor.wait(200)
    finally:
        critic.stop()
    return actor


def critic_settings(models: Models, port: int) -> dict[str, Any]:
    return {"model": {"restore_from_path": models.rm}, "server": {"port": port}, "optimizer": {"lr": 1e-3}}


def actor_settings(models: Models, reward_url: str, port: int, steps: int) -> dict[str, Any]:
    return {
        "model": {"restore_from_path": models.sft, "parallel": {"tensor_model_parallel_size": 2}},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {
            "max_steps": steps,
            "rollout_batch_size": 8,
            "mini_batch_size": 4,
            "energy": {"standardize": True},  # running statistics that a resume has to restore
            "kl": {"coefficient": 0.1, "controller": "adaptive", "target": 0.01, "horizon": 100},
        },
        "optimizer": {"lr": 1e-3},
        "servers": {"critic": {"url": f"http://127.0.0.1:{port}"}, "rewards": [{"url": reward_url}]},
    }


def trajectory(work: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (work / "actor" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in rows]


def test_a_resumed_run_is_the_uninterrupted_one(models: Models, reward_url: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = ppo(models, reward_url, whole, "whole", STEPS, whole / "critic")
    assert done.process.returncode == 0, done.log.read_text()[-4000:]
    for steps in (2, STEPS):
        done = ppo(models, reward_url, parts, f"to_{steps}", steps, parts / "critic")
        assert done.process.returncode == 0, done.log.read_text()[-4000:]
    assert len(trajectory(whole)) == STEPS
    assert trajectory(parts) == trajectory(whole)

    apart = ppo(models, reward_url, parts, "apart", STEPS + 1, tmp_path / "another_critic")
    assert apart.process.returncode != 0
    assert "8 critic updates, the critic server is at 0: restart it from" in apart.log.read_text()
