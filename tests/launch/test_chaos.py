"""A long launch keeps its memory; one whose processes are killed one after another is the same, bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import Models
from launched import eppo, processes_of, write

STEPS = 300


@dataclass
class Launched:
    """A launch of critic, reward server and an actor on two ranks, which saves every third step."""

    file: Path
    output: Path

    @classmethod
    def of(cls, models: Models, output: Path) -> "Launched":
        launch = eppo(models, output, steps=STEPS)
        actor = launch["jobs"]["actor"]["settings"]
        actor |= {"checkpoint.interval": 3, "shaping.energy_penalty": {"eta": 2.0, "standardize": True}}
        actor |= {"optimizer.lr": 1e-3, "ppo": {**actor["ppo"], "mini_batch_size": 4}}
        launch["jobs"]["critic"]["settings"]["optimizer.lr"] = 1e-3
        return cls(write(launch, output.with_suffix(".yaml")), output)

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nemo_eppo.cli", "launch", str(self.file)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def rows(self) -> list[dict[str, Any]]:
        file = self.output / "actor" / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in rows]

    def rollouts(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in (self.output / "actor" / "rollouts").iterdir()}


def of_job(launch: psutil.Process, script: str, name: str, number: int) -> psutil.Process:
    """One of the processes called `name` of the job with this script, from the job's first process downwards."""
    for child in launch.children(recursive=True):  # from the top
        if child.status() != psutil.STATUS_ZOMBIE and script in " ".join(child.cmdline()):
            alive = [p for p in child.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
            found = [p for p in [child, *alive] if name in " ".join([p.name(), *p.cmdline()])]
            return found[number]
    raise AssertionError(f"{script} is not running")


# What is killed, and whether the launch goes on; else it ends with this cause and is started again.
CHAOS: dict[str, tuple[str, str, int, str]] = {
    "reward rank": ("serve_reward_model", "serve_reward_model", 0, ""),
    "Triton of the reward server": ("serve_reward_model", "tritonserver", 0, ""),
    "a helper of the critic's Triton": ("serve_ppo_critic", "python_backend_stub", -1, ""),
    "critic rank": ("serve_ppo_critic", "serve_ppo_critic", 0, ""),
    "a rank of the actor": ("train_gpt_ppo_actor", "train_gpt_ppo_actor.py", 1, "actor ended with"),
    "torchrun of the actor": ("train_gpt_ppo_actor", "nemo_eppo.entry.torchrun", 0, "actor ended with"),
}


def memory_at(process: subprocess.Popen[str], run: Launched, step: int) -> int:
    """Resident bytes of all processes of a launch after this step.

    It is the least of five looks, because a process that writes a checkpoint is there at some. What processes share
    counts for each: otherwise the first garbage collection, which writes to all objects, would look like growth.
    """
    looks = []
    for extra in range(5):
        while len(run.rows()) < step + extra:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.1)
        total = 0
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += child.memory_info().rss
        looks.append(total)
    return min(looks)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_launch_with_killed_processes_is_the_launch_left_alone(models: Models, tmp_path: Path) -> None:
    whole = Launched.of(models, tmp_path / "whole")
    calm = whole.start()
    early = memory_at(calm, whole, STEPS // 3)
    late = memory_at(calm, whole, STEPS - 10)
    assert calm.wait(900) == 0, calm.communicate()[1]
    assert late < 1.05 * early, f"{early / 2**20:.0f} MiB after a third of the steps, {late / 2**20:.0f} at the end"

    run = Launched.of(models, tmp_path / "chaos")
    process, table = run.start(), list[str]()

    def until(condition: Callable[[], bool], seconds: float = 300) -> float:
        started = time.monotonic()
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() - started < seconds
            time.sleep(0.05)
        return time.monotonic() - started

    for name in [*CHAOS, *CHAOS, "critic rank"]:
        script, victim, number, cause = CHAOS[name]
        steps = len(run.rows())
        until(lambda steps=steps: len(run.rows()) >= steps + 2)  # type: ignore[misc]
        steps = len(run.rows())
        killed = of_job(psutil.Process(process.pid), script, victim, number)
        os.kill(killed.pid, signal.SIGKILL)
        if cause:
            started = time.monotonic()
            _, error = process.communicate(timeout=60)
            assert cause in error
            table.append(f"{name}: ended after {time.monotonic() - started:.1f} s")
            assert processes_of(run.output) == []
            process = run.start()
        else:
            seconds = until(lambda steps=steps: len(run.rows()) != steps)  # type: ignore[misc]
            table.append(f"{name}: went on after {seconds:.1f} s, {max(0, steps - len(run.rows()))} steps again")
    assert process.wait(900) == 0, process.communicate()[1]
    print("\n".join(table), flush=True)
    assert [row["step"] for row in run.rows()] == [*range(1, STEPS + 1)]
    assert run.rows() == whole.rows()
    assert run.rollouts() == whole.rollouts()
