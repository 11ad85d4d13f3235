"""Small models, data and job processes that the tests of this folder share."""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from distributed import free_port, run_ranks
from reference_eppo import ReferenceConfig, random_weights

from nemo_eppo.config import load_config
from nemo_eppo.launch.nursery import ForkedJob, Nursery
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.weights import export_tensors, load_tensors
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import Head, ModelConfig, ParallelConfig
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.tools.noun_task import write_noun_task
from nemo_eppo.training.reward_model import train_reward_model

LATENTS = 4  # of the InfoRM model
JOB = Path(__file__).parent / "job_process.py"


@dataclass(frozen=True)
class Models:
    """Directories of a policy and a reward model with known random weights, and the weights themselves."""

    root: Path
    reference: ReferenceConfig
    config: ModelConfig
    policy: dict[str, torch.Tensor]
    scorer: dict[str, torch.Tensor]

    @property
    def sft(self) -> Path:
        return self.root / "sft"

    @property
    def rm(self) -> Path:
        return self.root / "rm"

    @property
    def data(self) -> Path:
        return self.root / "data"


def read_weights(directory: Path, model: ModelConfig, head: Head) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint; for `run_ranks`."""
    runtime.initialize(ParallelConfig(), 1)
    chunks = build_model(model, ParallelConfig(), head=head)
    checkpoint.load(directory, ModelRunner(chunks, 4))
    return dict(export_tensors(chunks, model))


@cache
def nursery() -> Nursery:
    """Of this process: jobs are forked, because the imports of one take longer than most of what it does here."""
    return Nursery({"OMP_NUM_THREADS": "1"})


def end_of(process: ForkedJob, seconds: float) -> int:
    """Its exit status; TimeoutError if it has none in time."""
    deadline = time.monotonic() + seconds
    while (status := process.poll()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process.pid} has not ended within {seconds:g} s")
        time.sleep(0.05)
    return status


class Job:
    """A job of one or several ranks: log and settings in `directory`, where it also runs unless told else."""

    def __init__(
        self, kind: str, ranks: int, config: dict[str, Any], directory: Path, run_directory: Path | None = None
    ) -> None:
        directory.mkdir(parents=True)
        self.directory, self.log = directory, directory / "log.txt"
        (directory / "config.json").write_text(json.dumps(config, default=str))
        command = [str(JOB), kind, str(directory / "config.json"), str(run_directory or directory)]
        self.process = nursery().start(command, ranks, self.log)

    def wait(self, seconds: float) -> int:
        """Exit status; a job that takes three times as long as it should on an idle machine is stuck."""
        try:
            return end_of(self.process, 3 * seconds)
        except TimeoutError as error:
            self.stop(signal.SIGKILL)
            raise TimeoutError(self.log.read_text()[-4000:]) from error

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Until `condition()`; fails with the log's tail if the job ends before."""
        for _ in range(int(seconds / 0.2)):
            if condition():
                return
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text()[-4000:])

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
            end_of(self.process, 60)


def save_model(
    directory: Path, head: Head, model: ModelConfig, weights: dict[str, torch.Tensor], state: dict[str, Any], data: Path
) -> None:
    runtime.initialize(ParallelConfig(), 1)
    chunks = build_model(model, ParallelConfig(), head=head)
    load_tensors(chunks, model, lambda name: weights[name].float())
    manifest = checkpoint_files.Manifest(head=head, step=0, model=model, state=state)
    checkpoint.save(directory, ModelRunner(chunks, 4), manifest, data / "tokenizer")


def make_models(root: Path) -> Models:
    """A tiny policy and reward model of the noun task's vocabulary, saved as checkpoints, and its data."""
    reference = ReferenceConfig(
        num_layers=4,
        score_mean=0.3,
        score_std=0.7,
        missing_eos=0.5,
        eta=40.0,  # energies of random weights differ little: large enough to matter
        kl_coefficient=0.1,
        adam_eps=1e-4,  # Adam turns gradients near its epsilon into noise of the size of the learning rate
    )
    config = ModelConfig(
        num_layers=reference.num_layers,
        hidden_size=reference.hidden_size,
        ffn_hidden_size=reference.intermediate_size,
        num_attention_heads=reference.num_heads,
        num_query_groups=reference.num_kv_heads,
        vocab_size=reference.vocab_size,
        max_sequence_length=48,
    )
    models = Models(
        root, reference, config, random_weights(reference, seed=1), random_weights(reference, seed=2, head="score")
    )
    write_noun_task(models.data, 3, sft_examples=16, preference_pairs=16, prompts=32, validation_examples=8)
    state = {"score": "last", "mean": reference.score_mean, "std": reference.score_std}
    run_ranks(save_model, 1, models.sft, "lm", config, models.policy, {}, models.data)
    run_ranks(save_model, 1, models.rm, "scalar", config, models.scorer, state, models.data)
    return models


def reward_training(models: Models, kind: str, **changes: Any) -> RewardTrainingConfig:
    values: dict[str, Any] = {
        "model": {"restore_from_path": models.sft},
        "data": {
            "train": models.data / "preferences.train.jsonl",
            "validation": models.data / "preferences.validation.jsonl",
        },
        "reward": {
            "kind": kind,
            "inform": {"latent_size": LATENTS, "sft_responses": models.data / "sft.train.jsonl"},
        },
        "fit": {"global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    }
    return load_config(RewardTrainingConfig, {**values, **changes})


def _train(models: Models, kind: str, directory: Path) -> None:
    directory.mkdir()
    train_reward_model(reward_training(models, kind), Run(directory, 0, logging.getLogger(), ExpManagerConfig()))


WARM = {
    "members": 3,
    "linear_probe_steps": 1,
    "lrs": (1e-3, 3e-3),
    "dropouts": (0.0, 0.1),
    "average": True,
    "keep_best": 2,
}


def _train_warm(models: Models, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    run, sharded = Run(directory, 0, logging.getLogger(), ExpManagerConfig()), {"lr": 1e-3, "distributed": True}
    train_reward_model(reward_training(models, "bradley_terry", ensemble=WARM, optimizer=sharded), run)


def train_models(models: Models, root: Path) -> dict[str, Path]:
    """Checkpoints of an ODIN and an InfoRM model after two updates, and the average of three WARM members."""
    for kind in ("odin", "inform"):
        run_ranks(_train, 1, models, kind, root / kind)
    run_ranks(_train_warm, 1, models, root / "warm")
    return {kind: root / kind / "checkpoints" for kind in ("odin", "inform")} | {"warm": root / "warm" / "average"}


@contextmanager
def reward_server(models: Models, directory: Path) -> Iterator[str]:
    """The URL of a server of the reward model, whose job runs in `directory`."""
    port = free_port()
    settings = {"model": {"restore_from_path": models.rm}, "server": {"port": port}}
    job = Job("reward", 1, settings, directory)
    yield f"grpc://127.0.0.1:{port}"
    job.stop()
