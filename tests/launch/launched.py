"""Launch files of tiny runs, and what is left of a run on this machine."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from jobs import Models

STEPS = 2


def eppo(models: Models, output: Path, *, steps: int = STEPS) -> dict[str, Any]:
    """A launch of three jobs: critic, reward server, and the actor on two tensor-parallel ranks."""
    return {
        "name": "tiny",
        "output": str(output),
        "jobs": {
            "critic": {"script": "serve_ppo_critic", "settings": {"model.restore_from_path": str(models.rm)}},
            "reward": {"script": "serve_reward_model", "settings": {"model.restore_from_path": str(models.rm)}},
            "actor": {
                "script": "train_gpt_ppo_actor",
                "needs": ["critic", "reward"],
                "ranks_per_node": 2,
                "settings": {
                    "model.restore_from_path": str(models.sft),
                    "model.parallel.tensor_model_parallel_size": 2,
                    "data": {"train": str(models.data / "prompts.train.jsonl"), "max_prompt_length": 16},
                    "generation.max_new_tokens": 20,
                    "ppo": {"max_steps": steps, "rollout_batch_size": 8, "mini_batch_size": 8},
                },
            },
        },
    }


def write(launch: dict[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(launch, sort_keys=False))
    return file


def processes_of(output: Path, but: int = 0) -> list[str]:
    """Command lines of running processes that know the output directory, this one and `but` excepted."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(output) in line and process.pid not in (os.getpid(), but):
            found.append(line)
    return found


def shared_memory_of(process: int) -> set[Path]:
    """Blocks of shared memory that the descendants of a process have mapped."""
    blocks = set()
    for child in psutil.Process(process).children(recursive=True):
        with suppress(OSError):  # it has just ended
            maps = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            blocks |= {Path(line.split()[5]) for line in maps if "/dev/shm/" in line}
    return {block for block in blocks if block.exists()}
