"""An actor that loses its reward server saves what it has, and ends: soon without patience, else when it is told to."""

import io
import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest
from distributed import free_port, run_ranks
from jobs import Job, Models

from nemo_eppo.config import RunStopped
from nemo_eppo.megatron import runtime
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.servers.client import ServerUnavailable
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.servers import ServersConfig
from nemo_eppo.training.recovery import Recovery
from nemo_eppo.training.stopping import StopWatch


# that it goes on when its server is back is seen in test_interrupted (critic) and tests/launch/test_local (reward)
@pytest.mark.parametrize("patience", [pytest.param(0, marks=pytest.mark.slow), 300])
def test_a_killed_reward_server_loses_no_step(models: Models, tmp_path: Path, patience: int) -> None:
    reward_port = free_port()
    lost = f"reward server at grpc://127.0.0.1:{reward_port} unavailable for reward_infer"
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
            "ppo": {
                "max_steps": 10_000,
                "rollout_batch_size": 4,
                "samples_per_prompt": 2,
                "mini_batch_size": 8,
                "advantages": {"estimator": "rloo"},
            },
            "critic": None,
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
        done = json.loads(metrics.read_text().splitlines()[-1])["step"]
        assert [checkpoint_files.read_manifest(path).step for path in saved] == [done]
    finally:
        for job in (actor, reward):
            job.stop()
    log = actor.log.read_text()
    assert lost in log
    assert (f"told to end while a server is lost: the first {done} steps are saved\n" in log) == (patience > 0)
    if not patience:
        own, _, launchers = log.partition("failed (exitcode: 1)")
        assert launchers  # torchrun says so
        assert own.count(lost) == 1  # from one of two ranks
        assert "Traceback" not in own


def told_to_end(saved: int) -> list[str]:
    """What an actor logs that has done 20 steps, has saved `saved`, and is told to end while a server is lost."""
    runtime.initialize(ParallelConfig(), 1)
    log = io.StringIO()
    logger = logging.getLogger("told_to_end")
    logger.addHandler(logging.StreamHandler(log))
    logger.setLevel(logging.INFO)
    error = ServerUnavailable("the server is stopping")
    with StopWatch(Run(Path(), 0, logger, ExpManagerConfig())) as watch:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(RunStopped):
            Recovery([], ServersConfig(), logger).recover(error, 20, lambda: saved, watch)
    return log.getvalue().splitlines()


@pytest.mark.parametrize(("saved", "more"), [(20, ""), (15, "; 5 more have to be made again")])
def test_an_actor_that_is_told_to_end_says_how_many_of_its_steps_are_saved(saved: int, more: str) -> None:
    [said] = run_ranks(told_to_end, 1, saved)
    assert said[-1] == f"told to end while a server is lost: the first {saved} steps are saved{more}"
