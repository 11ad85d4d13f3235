"""The loop that SFT and reward-model training share: batches, updates, validation, metrics, checkpoints, resume."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch.distributed as dist
from pydantic import Field, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.data.datasets import GlobalBatches
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.model import Head
from nemo_eppo.megatron.optimizer import OptimizerConfig
from nemo_eppo.megatron.runner import LossFunction, ModelRunner, Rows
from nemo_eppo.observability.experiment import Run
from nemo_eppo.observability.progress import Progress
from nemo_eppo.training.setup import Plan, build

CHECKPOINTS = "checkpoints"


class FitSettings(Config):
    """How long to train, and when to look and save."""

    epochs: int = Field(1, ge=1)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after so many updates; null for all epochs."""
    global_batch_size: int = Field(32, ge=1)
    """Examples (pairs for a reward model) per update, over all ranks."""
    validation_interval: int = Field(0, ge=0)
    """Updates between validations; 0 for only the last."""
    checkpoint_interval: int = Field(0, ge=0)
    """Updates between checkpoints; 0 for only the last."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep."""


class TextDataConfig(Config):
    """Training and validation data of SFT and reward models."""

    train: Path
    """JSON lines; .gz is read too."""
    validation: Path
    """Held-out examples."""
    max_sequence_length: int | None = Field(None, ge=2)
    """Longest prompt + response in tokens; null for the model's window."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a longer example."""

    @model_validator(mode="after")
    def _held_out(self) -> "TextDataConfig":
        if self.train == self.validation:
            raise ValueError(f"train and validation are the same file, {self.train}")
        return self


class Task(Protocol):
    """What is being learnt."""

    title: ClassVar[str]
    head: ClassVar[Head]
    columns: ClassVar[Mapping[str, str]]
    """Progress-bar labels -> metric names."""
    group: ClassVar[int]
    """Rows per example: 1, or 2 for a pair."""

    def __len__(self) -> int:
        """Training examples."""

    def rows(self, indices: list[int]) -> Rows:
        """The tensors of a global batch of examples, `group` rows each."""

    def loss_function(self, rows: Rows) -> LossFunction:
        """The loss of a global batch; see ModelRunner.train_step."""

    def validate(self, runner: ModelRunner) -> dict[str, float]:
        """Metrics on the validation data, collective; their names start with "validation/"."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to record beside the weights, after `validate`."""


def fit(
    task: Task, plan: Plan, settings: FitSettings, optimizer: OptimizerConfig, seed: int, run: Run
) -> dict[str, float]:
    """Train `task` to the end, or on from the run's newest checkpoint; the last validation's metrics.

    The checkpoint of the last step is `<run directory>/checkpoints/step_N`.
    """
    batches = GlobalBatches(len(task), settings.global_batch_size, seed=seed)
    last = len(task) // settings.global_batch_size * settings.epochs
    last = min(last, settings.max_steps or last)
    replicas = plan.setup.parallel.data_parallel_size(runtime.world_size())
    if settings.global_batch_size % replicas:
        raise ConfigError(f"global_batch_size = {settings.global_batch_size} is not divisible by {replicas} replicas")
    runtime.initialize(plan.setup.parallel, seed)
    folder = run.directory / CHECKPOINTS
    resume = checkpoint.latest(folder)
    runner = build(plan, task.head, optimizer=optimizer, total_steps=last, resume=resume)
    done = 0
    if resume is not None:
        manifest = checkpoint.read_manifest(resume)
        done = manifest.step
        batches.load_state_dict(manifest.state["batches"])
    validation: dict[str, float] = {}
    with ExitStack() as stack:
        is_first = dist.get_rank() == 0
        metrics = stack.enter_context(run.open_metrics(done or None)) if is_first else None
        progress = stack.enter_context(Progress(task.title, last, task.columns, done=done, disable=not is_first))
        for step in range(done + 1, last + 1):
            started = time.perf_counter()
            rows = task.rows(next(batches))
            update = runner.train_step(rows, task.loss_function(rows), group=task.group)
            row = {f"train/{name}": value for name, value in update.items()}
            row["seconds/step"] = time.perf_counter() - started
            row["train/tokens_per_second"] = float(rows["lengths"].sum()) / row["seconds/step"]
            save = step == last or _due(step, settings.checkpoint_interval)
            if save or _due(step, settings.validation_interval):
                validation = task.validate(runner)
                row |= validation
            if save:
                state = {"batches": batches.state_dict(), **task.state()}
                checkpoint.save(
                    folder / f"step_{step:06d}",
                    runner,
                    checkpoint.Manifest(head=task.head, step=step, model=plan.model, optimizer=True, state=state),
                    plan.tokenizer_path,
                    keep=settings.keep,
                )
            if metrics is not None:
                metrics.log(step, row)
            progress.update(step, row)
    runtime.shutdown()
    return validation


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
