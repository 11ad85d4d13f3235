"""A whole EPPO run on the one device: actor, critic server and reward server of a launch file, with fresh models.

Then the same launch again, whose actor is killed after a checkpoint, and which is started anew: on a CPU its metrics
and rollouts are those of the undisturbed run bit for bit.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from checks import CHECK, FAIL, at_most, passed
from pairs import Options, Row
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.files import complete_lines
from nemo_eppo.megatron import device
from nemo_eppo.tools.noun_task import MAX_RESPONSE_TOKENS, vocabulary, write_noun_task

KILLED_AFTER = 1  # the step of whose checkpoint it is
PATIENCE_S = 150.0  # for each of three launches, of which the first also compiles
ROOT = Path(__file__).resolve().parents[2]
CLOCKED = ("second", "time", "memory")
"""Parts of the names of metrics that differ from run to run."""


def measure(options: Options) -> Iterator[Row]:
    try:
        import pytriton  # noqa: F401
    except ImportError as error:
        yield {"what": "PyTriton", "found": f"not run: {error}", "expected": "can be imported", CHECK: FAIL}
        return
    steps = 3 if options.smallest else 8
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_models(folder, options.smallest)
        started = time.monotonic()
        whole = Launch(folder, "whole", steps)
        whole.run()
        rows = whole.metrics()
        yield {"what": "launch", "steps": steps, "seconds": time.monotonic() - started}
        times = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[-1] if "seconds/" in name}
        for name, seconds in times.items():
            yield {"what": name, "seconds": seconds}
        yield done("steps", [row["step"] for row in rows], list(range(1, steps + 1)))
        wrong = sorted({name for row in rows for name, value in row.items() if not finite(value)})
        yield done("metrics that are not finite", wrong, [])
        mismatch = max(row.get("rollout/engine_mismatch_mean", 0.0) for row in rows)
        yield at_most({"what": "engine mismatch, mean"}, mismatch, 0.05 if device.on_gpu() else 1e-4)

        again = Launch(folder, "again", steps)
        status = again.run_until_killed()
        yield passed({"what": "exit status of the killed launch", "found": str(status)}, "not 0", status != 0)
        kept = len(again.metrics())
        again.run()
        yield done("steps, resumed", [row["step"] for row in again.metrics()], list(range(1, steps + 1)))
        yield passed(
            {"what": "steps before it was killed", "found": kept}, f"{KILLED_AFTER} to {steps - 1}", kept < steps
        )
        largest = difference(rows, again.metrics())
        row: Row = {"what": "largest relative difference of a metric, resumed", "found": largest}
        yield row if device.on_gpu() else at_most(row, largest, 0.0)
        same = whole.rollouts() == again.rollouts()
        told: Row = {"what": "the same rollouts, resumed", "found": str(same)}
        yield told if device.on_gpu() else passed(told, "True", same)


def make_models(folder: Path, smallest: bool) -> None:
    """Policy, reward model and data, with the tokenizer of the noun task."""
    words = vocabulary()
    config = LlamaConfig(
        num_hidden_layers=2 if smallest else 8,
        hidden_size=32 if smallest else 1024,
        intermediate_size=64 if smallest else 4096,
        num_attention_heads=4 if smallest else 16,
        num_key_value_heads=2 if smallest else 4,
        vocab_size=len(words) + 2,
        max_position_embeddings=48,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        num_labels=1,
        nemo_eppo_reward={"mean": 0.0, "std": 1.0},
    )
    torch.manual_seed(0)
    for kind, name in ((LlamaForCausalLM, "policy"), (LlamaForSequenceClassification, "reward")):
        kind(config).save_pretrained(folder / name)
        word_level(words, folder / name)
    rows = 32 if smallest else 512
    write_noun_task(folder / "data", 3, sft_examples=16, preference_pairs=16, prompts=rows, validation_examples=8)


class Launch:
    """A launch of three jobs with one rank each, which share the device."""

    def __init__(self, folder: Path, name: str, steps: int) -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        self.output, self._file = folder / name, folder / f"{name}.yaml"
        batch = 8 if steps == 3 else 64

        def model(name: str) -> dict[str, Any]:
            return {"restore_from_path": str(folder / name), "micro_batch_size": batch}

        actor = {
            "model": model("policy"),
            "data": {"train": str(folder / "data" / "prompts.train.jsonl"), "max_prompt_length": 16},
            "generation": {"max_new_tokens": MAX_RESPONSE_TOKENS},
            "ppo": {"max_steps": steps, "rollout_batch_size": batch, "mini_batch_size": batch // 2},
            "checkpoint": {"interval": 1},
            "optimizer": {"lr": 1e-4},
            "gold_reward": "nemo_eppo.tools.noun_task:gold_reward",
        }
        critic = {"model": model("reward"), "optimizer": {"lr": 1e-4}}
        jobs = {
            "critic": {"script": "serve_ppo_critic", "settings": critic},
            "reward": {"script": "serve_reward_model", "settings": {"model": model("reward")}},
            "actor": {"script": "train_gpt_ppo_actor", "needs": ["critic", "reward"], "settings": actor},
        }
        environment = {"CUDA_VISIBLE_DEVICES": gpu if device.on_gpu() else ""}
        launch = {"name": name, "output": str(self.output), "environment": environment, "jobs": jobs}
        self._file.write_text(yaml.safe_dump(launch))

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nemo_eppo.cli", "launch", str(self._file)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def run(self) -> None:
        """Run to the end; RuntimeError with what it said if it fails, or takes too long."""
        process = self.start()
        try:
            _, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.terminate()  # its jobs end with it
        if process.returncode:
            raise RuntimeError(f"the launch {self._file.stem} ended with {process.returncode}: {said[-3000:]}")

    def run_until_killed(self) -> int:
        """Kill the actor as soon as it has a checkpoint; return the exit status of the launch."""
        process, begun = self.start(), time.monotonic()
        checkpoint = self.output / "actor" / "checkpoints" / f"step_{KILLED_AFTER:06d}"
        try:
            while not checkpoint.exists() and process.poll() is None and time.monotonic() - begun < PATIENCE_S:
                time.sleep(0.02)
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                if any("train_gpt_ppo_actor" in part for part in child.cmdline()):  # its first process, then its own
                    child.send_signal(signal.SIGKILL)
                    break
            process.communicate(timeout=PATIENCE_S)
        finally:
            process.terminate()
        return process.returncode

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in complete_lines(self.output / "actor" / "metrics.jsonl")]

    def rollouts(self) -> dict[str, str]:
        return {file.name: file.read_text() for file in (self.output / "actor" / "rollouts").iterdir()}


def done(what: str, found: object, expected: object) -> Row:
    return passed({"what": what, "found": str(found)}, str(expected), found == expected)


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def difference(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    largest = 0.0
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() | other.keys():
            if not any(part in name for part in CLOCKED):
                ours, theirs = float(row[name]), float(other[name])
                largest = max(largest, abs(ours - theirs) / max(abs(ours), 1e-6))
    return largest
