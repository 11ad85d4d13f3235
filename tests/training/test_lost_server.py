"""A server that dies in the middle of a step ends the actor soon, and the message names the server."""

import json
import os
import signal
import time
from pathlib import Path

from distributed import free_port
from jobs import Job, Models


def test_a_killed_reward_server_fails_the_actor_within_30_seconds(models: Models, tmp_path: Path) -> None:
    critic_port, reward_port = free_port(), free_port()
    critic = Job(
        "critic",
        1,
        {"model": {"restore_from_path": models.rm}, "server": {"port": critic_port}, "optimizer": {"lr": 1e-6}},
        tmp_path / "critic",
    )
    ready = tmp_path / "ready.json"
    reward = Job(
        "reward",
        1,
        {"model": {"restore_from_path": models.rm}, "server": {"port": reward_port, "ready_file": ready}},
        tmp_path / "reward",
    )
    actor = Job(
        "actor",
        2,
        {
            "model": {"restore_from_path": models.sft, "parallel": {"tensor_model_parallel_size": 2}},
            "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
            "generation": {"max_new_tokens": 20},
            "ppo": {"max_steps": 10_000, "rollout_batch_size": 8, "mini_batch_size": 8},
            "critic": {"server": {"url": f"http://127.0.0.1:{critic_port}"}},
            "rewards": [{"server": {"url": f"http://127.0.0.1:{reward_port}"}}],
            "optimizer": {"lr": 1e-6},
        },
        tmp_path / "actor",
    )
    try:
        metrics = tmp_path / "actor" / "metrics.jsonl"
        actor.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
        os.kill(json.loads(ready.read_text())["pid"], signal.SIGKILL)
        killed = time.monotonic()
        assert actor.wait(60) != 0
        assert time.monotonic() - killed < 30
    finally:
        for job in (actor, critic, reward):
            job.stop()
    log = actor.log.read_text()
    own, _, launchers = log.partition("failed (exitcode: 1)")
    assert launchers  # torchrun says so
    assert own.count(f"reward server at http://127.0.0.1:{reward_port} unavailable") == 1  # from one of two ranks
    assert "Traceback" not in own
