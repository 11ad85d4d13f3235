"""An actor that loses its reward server saves what it has, then waits for the server, or ends soon."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from distributed import free_port
from jobs import Job, Models

from nemo_eppo.models import checkpoint_files


# waiting for a server is seen in test_interrupted (critic) and tests/launch/test_local (reward) too
@pytest.mark.parametrize("patience", [0, pytest.param(300, marks=pytest.mark.slow)])
def test_a_killed_reward_server_loses_no_step(models: Models, tmp_path: Path, patience: int) -> None:
    critic_port, reward_port = free_port(), free_port()
    lost = f"reward server at grpc://127.0.0.1:{reward_port} unavailable for reward_infer"
    critic = Job(
        "critic",
        1,
        {"model": {"restore_from_path": models.rm}, "server": {"port": critic_port}, "optimizer": {"lr": 1e-6}},
        tmp_path / "critic",
    )
    ready = tmp_path / "ready.json"
    served = {"model": {"restore_from_path": models.rm}, "server": {"port": reward_port, "ready_file": ready}}
    reward = Job("reward", 1, served, tmp_path / "reward")
    actor = Job(
        "actor",
        2,
        {
            "model": {"restore_from_path": models.sft, "parallel": {"tensor_model_parallel_size": 2}},
            "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
            "generation": {"max_new_tokens": 20},
            "ppo": {"max_steps": 10_000, "rollout_batch_size": 8, "mini_batch_size": 8},
            "critic": {"server": {"url": f"grpc://127.0.0.1:{critic_port}"}},
            "rewards": [{"server": {"url": f"grpc://127.0.0.1:{reward_port}"}}],
            "optimizer": {"lr": 1e-6},
            "checkpoint": {"interval": 0},
            "servers": {"patience": patience},
        },
        tmp_path / "actor",
    )
    try:
        metrics = tmp_path / "actor" / "metrics.jsonl"
        actor.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
        os.kill(json.loads(ready.read_text())["pid"], signal.SIGKILL)
        killed = time.monotonic()
        if patience:
            reward.wait(30)
            actor.wait_for(lambda: lost in actor.log.read_text())
            reward = Job("reward", 1, served, tmp_path / "reward_again")
            steps = len(metrics.read_text().splitlines())
            actor.wait_for(lambda: len(metrics.read_text().splitlines()) >= steps + 2)
            rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
            assert rows == [*range(1, len(rows) + 1)]
        else:
            assert actor.wait(90) != 0
            assert time.monotonic() - killed < 60
            saved = checkpoint_files.complete_in(tmp_path / "actor" / "checkpoints")
            assert [checkpoint_files.read_manifest(path).step for path in saved] == [
                json.loads(metrics.read_text().splitlines()[-1])["step"]
            ]
    finally:
        for job in (actor, critic, reward):
            job.stop()
    log = actor.log.read_text()
    assert lost in log
    assert ("all servers answer again" in log) == (patience > 0)
    if not patience:
        own, _, launchers = log.partition("failed (exitcode: 1)")
        assert launchers  # torchrun says so
        assert own.count(lost) == 1  # from one of two ranks
        assert "Traceback" not in own
