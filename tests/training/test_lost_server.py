"""An actor that loses its reward server saves what it has, and ends: soon without patience, else when it is told to."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from distributed import free_port
from jobs import Job, Models

from nemo_eppo.models import checkpoint_files


# that it goes on when its server is back is seen in test_interrupted (critic) and tests/launch/test_local (reward)
@pytest.mark.parametrize("patience", [0, 300])
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
            actor.wait_for(lambda: "waiting for the reward server" in actor.log.read_text())
            actor.process.terminate()
        code = actor.wait(90)
        assert code == (128 + signal.SIGTERM if patience else 1)
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
    assert ("told to end while a server is lost: the steps done are saved" in log) == (patience > 0)
    if not patience:
        own, _, launchers = log.partition("failed (exitcode: 1)")
        assert launchers  # torchrun says so
        assert own.count(lost) == 1  # from one of two ranks
        assert "Traceback" not in own
