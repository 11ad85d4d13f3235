"""Seconds of a PPO step and its phases as `nemo-eppo doctor --estimate here` predicts them, and as a run takes them.

Each setting is a launch file, which `nemo-eppo launch` runs; responses are as long as they may be. The figures of the
machine are measured once, before, on other sizes than any setting has. A setting is launched once, for there are many:
its rounds are steps. Measured is the least of all steps but the first, because what else runs only adds. `case` is what
differs from 4 layers x 256, 16 x (32 + 32) tokens, one micro-batch, critic and reward model on the actor's ranks.
Phases of less than a tenth of a step are left out.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from pairs import Options, Row
from startup import environment
from trl_ppo import LR, Work

from nemo_eppo.launch.calibration import measure_here
from nemo_eppo.launch.cluster import Cluster
from nemo_eppo.launch.colocation import colocated
from nemo_eppo.launch.examination import examine
from nemo_eppo.launch.launch_file import read_launch
from nemo_eppo.launch.step_time import StepEstimate, estimate_step

Settings = dict[str, Any]
TP, PP = "model.parallel.tensor_model_parallel_size", "model.parallel.pipeline_model_parallel_size"
ROWS = 16
LARGE = 0.1
"""Share of the measured step from which a phase is shown."""
CASES: dict[str, tuple[dict[str, int], Settings]] = {
    "the base": ({}, {}),
    "8 layers": ({"layers": 8}, {}),
    "width 384": ({"width": 384}, {}),
    "width 64": ({"width": 64}, {}),
    "48 rows": ({}, {"ppo.rollout_batch_size": 48, "ppo.mini_batch_size": 48, "model.micro_batch_size": 48}),
    "96 tokens of response": ({}, {"generation.max_new_tokens": 96}),
    "micro-batches of 2": ({}, {"model.micro_batch_size": 2}),
    "mini-batches of 4, 2 epochs": ({}, {"ppo.mini_batch_size": 4, "ppo.epochs": 2}),
    "eppo, own_response": ({}, {"method": "eppo"}),
    "TP 2": ({"ranks": 2}, {TP: 2}),
    "PP 2, micro-batches of 4": ({"ranks": 2}, {PP: 2, "model.micro_batch_size": 4}),
    "DP 2": ({"ranks": 2}, {}),
    "servers": ({"servers": 1}, {}),
}


def measure(options: Options) -> list[Row]:
    cluster = measure_here({"fp32"})
    print(cluster.model_dump_json(), flush=True)
    rows: list[Row] = []
    chosen = {"the base": CASES["the base"]} if options.smallest else CASES
    for case, (size, settings) in chosen.items():
        with tempfile.TemporaryDirectory() as folder:
            found = compared(case, Path(folder), size, settings, cluster, options)
        print(json.dumps(found), flush=True)
        rows += found
    return rows


def compared(
    case: str, folder: Path, size: dict[str, int], settings: Settings, cluster: Cluster, options: Options
) -> list[Row]:
    """Rows of the step and of its large phases."""
    work = Work(folder, options.rounds, options.smallest, size.get("layers", 4), size.get("width", 256))
    file = launch_file(work, size, settings, options.smallest)
    expected = predicted(file, cluster)
    steps = run(file)
    phases = {phase.name: phase.seconds for phase in expected.phases} | {"step": expected.seconds}
    rows: list[Row] = []
    for name in phases:
        clock = min(step[name] for step in steps[1:])
        if clock >= LARGE * min(step["step"] for step in steps[1:]):
            row: Row = {"case": case, "what": name, "predicted s": phases[name], "clock s": clock}
            rows.append(row | {"predicted / clock": phases[name] / clock})
    return rows


def launch_file(work: Work, size: dict[str, int], settings: Settings, smallest: bool) -> Path:
    policy, reward, optimizer = work.folder / "policy", work.folder / "reward", {"lr": LR}
    batch = 4 if smallest else ROWS
    serving = {"model.restore_from_path": str(reward), "model.micro_batch_size": batch}
    actor: Settings = {
        "method": "ppo",
        "model.restore_from_path": str(policy),
        "model.micro_batch_size": batch,
        "data.train": str(work.folder / "prompts.jsonl"),
        "data.max_prompt_length": work.prompt,
        "generation.max_new_tokens": 8 if smallest else 32,
        "ppo.max_steps": work.steps,
        "ppo.rollout_batch_size": batch,
        "ppo.mini_batch_size": batch,
        "optimizer": optimizer,
        "checkpoint.interval": 0,
        **settings,
    }
    jobs: dict[str, Settings] = {
        "critic": {"script": "serve_ppo_critic", "settings": {**serving, "optimizer": optimizer}},
        "reward": {"script": "serve_reward_model", "settings": serving},
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic", "reward"],
            "ranks_per_node": size.get("ranks", 1),
            "settings": actor,
        },
    }
    if "servers" not in size:
        jobs["actor"]["colocate"] = True
    file = work.folder / "launch.yaml"
    file.write_text(yaml.safe_dump({"name": "cost", "output": str(work.folder / "run"), "jobs": jobs}))
    return file


def predicted(file: Path, cluster: Cluster) -> StepEstimate:
    launch = colocated(read_launch(file))
    findings, jobs = examine(launch, here=True, files=True)
    assert not [finding for finding in findings if finding.status == "error"], findings
    return estimate_step(launch, jobs, next(job for job in jobs if job.kind.samples), cluster)


def run(file: Path, checkout: Path | None = None) -> list[dict[str, float]]:
    """Launch the jobs anew, by another checkout with its own environment if one is given; seconds of each phase in each
    step of the actor."""
    shutil.rmtree(file.parent / "run", ignore_errors=True)
    python, variables = sys.executable, None
    if checkout is not None:
        python, variables = str(checkout / ".venv/bin/python"), environment(checkout)
    command = [python, "-m", "nemo_eppo.cli", "launch", str(file)]
    done = subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    lines = (file.parent / "run" / "actor" / "metrics.jsonl").read_text().splitlines()
    steps = map(json.loads, lines)
    return [{key.removeprefix("seconds/"): s for key, s in step.items() if "seconds/" in key} for step in steps]
