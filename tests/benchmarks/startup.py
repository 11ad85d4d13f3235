"""Seconds that people wait: for --help, a wrong key, doctor, the first PPO step of a launch, and its end.

With --against, both checkouts do the same in turn, who begins changes from round to round, and ratios are told; each
needs an environment in .venv of its own.
The launch has a critic and a reward server, and an actor on two tensor-parallel ranks, of tiny fresh models.
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pairs import Options, Row

from nemo_eppo.tools.noun_task import write_noun_task

HERE = Path(__file__).resolve().parents[2]
STEPS = 5
SCRIPT = "examples/nlp/gpt/train_gpt_ppo_actor.py"


def measure(options: Options) -> list[Row]:
    checkouts = {"here": HERE} | ({"other": options.against.resolve()} if options.against else {})
    found: dict[str, dict[str, list[float]]] = {name: {} for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        models = None if options.smallest else make_models(Path(folder))
        for number in range(options.rounds):
            for name in sorted(checkouts, reverse=bool(number % 2)):
                for what, seconds in waits(checkouts[name], models, Path(folder) / f"{name}_{number}").items():
                    found[name].setdefault(what, []).append(seconds)
    rows: list[Row] = []
    for what, here in found["here"].items():
        row: Row = {"what": what, "seconds": statistics.median(here), "fastest": min(here), "slowest": max(here)}
        if options.against:
            ratios = [mine / theirs for mine, theirs in zip(here, found["other"][what], strict=True)]
            row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        rows.append(row)
    return rows


def waits(checkout: Path, models: Path | None, output: Path) -> dict[str, float]:
    """Return the seconds of each thing that a person waits for; of a launch, if there are models for it."""
    python = str(checkout / ".venv/bin/python")

    def run(*command: str) -> float:
        started = time.perf_counter()
        subprocess.run([python, *command], cwd=checkout, env=environment(checkout), capture_output=True, check=False)
        return time.perf_counter() - started

    seconds = {"--help of a script": run(SCRIPT, "--help"), "a wrong key": run(SCRIPT, "modle.precision=bf16")}
    seconds["doctor"] = run("-m", "nemo_eppo.cli", "doctor")
    if models is None:
        return seconds
    return seconds | measure_launch([python, "-m", "nemo_eppo.cli", "launch"], checkout, models, output)


def environment(checkout: Path) -> dict[str, str]:
    """Variables with which a checkout's own code is found, whatever its environment was installed from."""
    return os.environ | {"PYTHONPATH": str(checkout)}


def measure_launch(command: list[str], checkout: Path, models: Path, output: Path) -> dict[str, float]:
    """Launch PPO and watch its metrics."""
    file = write(ppo(models, output), output.with_suffix(".yaml"))
    metrics = output / "actor" / "metrics.jsonl"
    times: dict[int, float] = {}
    started = time.perf_counter()
    start = partial(subprocess.Popen, cwd=checkout, env=environment(checkout), stdout=subprocess.DEVNULL)
    with start([*command, str(file)]) as process:
        while process.poll() is None:
            steps = metrics.read_text().count("\n") if metrics.exists() else 0
            times.setdefault(steps, time.perf_counter() - started)
            time.sleep(0.02)
    ended = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the launch of {checkout} ended with {process.returncode}; its logs are in {output}/logs")
    return {"launch: first step after": times[1], "launch: returns after the last step": ended - times[STEPS]}


def make_models(folder: Path) -> Path:
    """Train an SFT and a reward model for a step, and write prompts."""
    write_noun_task(folder / "data", 0, sft_examples=64, preference_pairs=64, prompts=64, validation_examples=16)
    quickstart = yaml.safe_load((HERE / "examples/launch/quickstart.yaml").read_text())
    quickstart["jobs"] = {name: quickstart["jobs"][name] for name in ("sft", "reward_model")}
    for job in quickstart["jobs"].values():
        job["ranks_per_node"] = 1
        job["settings"]["optimizer"] = {"lr": 1e-3}
        job["settings"]["fit"] = {"global_batch_size": 32, "max_steps": 1}
    quickstart["output"] = str(folder)
    file = write(quickstart, folder / "models.yaml")
    launch = [str(HERE / ".venv/bin/python"), "-m", "nemo_eppo.cli", "launch", str(file)]
    subprocess.run(launch, cwd=HERE, stdout=subprocess.DEVNULL, check=True)
    return folder


def ppo(models: Path, output: Path) -> dict[str, Any]:
    """Return a launch file of three jobs."""
    server = {"model.restore_from_path": str(models / "reward_model/checkpoints")}
    actor = {
        "model.restore_from_path": str(models / "sft/checkpoints"),
        "model.parallel.tensor_model_parallel_size": 2,
        "data": {"train": str(models / "data/prompts.train.jsonl"), "max_prompt_length": 16},
        "generation.max_new_tokens": 20,
        "ppo": {"max_steps": STEPS, "rollout_batch_size": 8, "mini_batch_size": 8},
    }
    jobs: Mapping[str, Any] = {
        "critic": {"script": "serve_ppo_critic", "settings": server},
        "reward": {"script": "serve_reward_model", "settings": server},
        "actor": {
            "script": "train_gpt_ppo_actor", "needs": ["critic", "reward"], "ranks_per_node": 2, "settings": actor,
        },
    }  # fmt: skip
    return {"name": "startup", "output": str(output), "jobs": jobs}


def write(launch: Mapping[str, Any], file: Path) -> Path:
    file.write_text(yaml.safe_dump(dict(launch), sort_keys=False))
    return file
