"""Launch files of tiny runs, and what is left of a run on this machine."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from jobs import Models

STEPS = 2
MADE = "${output}/sft/checkpoints"
ARCHITECTURE = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}


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


def stages(models: Models, output: Path) -> dict[str, Any]:
    """SFT of a fresh model, a reward model from it, servers from that, and the actor from the SFT model."""
    sft, preferences = (
        {side: str(models.data / f"{kind}.{side}.jsonl") for side in ("train", "validation")}
        for kind in ("sft", "preferences")
    )
    fresh = {"architecture": {**ARCHITECTURE, "max_sequence_length": 48}, "tokenizer": str(models.data / "tokenizer")}
    reward = {"model.restore_from_path": "${output}/reward_model/checkpoints"}
    jobs = {
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic", "reward"],
            "settings": {
                "model.restore_from_path": MADE,
                "data": {"train": str(models.data / "prompts.train.jsonl"), "max_prompt_length": 16},
                "generation.max_new_tokens": 20,
                "ppo": {"max_steps": 2, "rollout_batch_size": 8, "mini_batch_size": 8},
            },
        },
        "critic": {"script": "serve_ppo_critic", "needs": ["reward_model"], "settings": {**reward}},
        "reward": {"script": "serve_reward_model", "needs": ["reward_model"], "settings": {**reward}},
        "reward_model": {
            "script": "train_reward_model",
            "needs": ["sft"],
            "settings": {"model.restore_from_path": MADE, "data": preferences, "fit.global_batch_size": 8},
        },
        "sft": {"script": "train_gpt_sft", "settings": {"model": fresh, "data": sft, "fit.global_batch_size": 8}},
    }
    return {"name": "stages", "output": str(output), "jobs": jobs}


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
