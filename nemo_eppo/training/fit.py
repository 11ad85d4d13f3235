"""The loop that SFT and reward-model training share: batches, updates, validation, metrics, checkpoints, resume."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch.distributed as dist

from nemo_eppo.config import RunStopped
from nemo_eppo.data.datasets import Examples, GlobalBatches
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.collectives import require_same
from nemo_eppo.megatron.optimizer import train_head_only
from nemo_eppo.megatron.runner import LossFunction, ModelRunner, Rows
from nemo_eppo.megatron.saving import CHECKPOINTS, CheckpointSaver, due, tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.observability.progress import Progress
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import Head
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.training import CheckpointConfig, FitSettings, OptimizerConfig, SFTConfig
from nemo_eppo.training.setup import Plan, build
from nemo_eppo.training.stopping import ENDS, PROBE_ENDS, RESUMES, SAVED, StopWatch

VALIDATION_ROWS = 256  # rows per forward pass over all ranks; bounds memory and has no effect on results


class Task(ABC):
    """What `Fit` trains: data, loss and validation."""

    title: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    """Metric names by their progress-bar labels."""
    validated: ClassVar[tuple[str, ...]]
    """Names of the metrics that `validate` returns."""
    group: ClassVar[int] = 1
    """Rows per example: 1, or 2 for a pair."""
    head: Head
    """Kind of output layer that the model has."""
    latent_size = 0
    """Size d of the latents of the head "inform"; 0 for other heads."""
    train: Examples[Any]
    validation: Examples[Any]

    @abstractmethod
    def rows(self, indices: list[int]) -> Rows:
        """Return the tensors of a global batch of examples, `group` rows each."""

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        """Add to `rows` tensors that the loss needs of the whole global batch, if any; collective."""
        return rows

    @abstractmethod
    def loss_function(self, rows: Rows) -> LossFunction:
        """Return the loss of a global batch; see `ModelRunner.train_step`."""

    @abstractmethod
    def validate(self, runner: ModelRunner) -> dict[str, float]:
        """Return metrics on the validation data, whose names start with "validation/"; collective."""

    def state(self) -> dict[str, Any]:
        """Return further state for a checkpoint's manifest, usually none; called after `validate`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One training run, ready to start."""

    task: Task
    plan: Plan
    settings: FitSettings
    optimizer: OptimizerConfig
    saving: CheckpointConfig
    seed: int
    """Seed of the order of examples, of fresh weights and of dropout."""
    run: Run
    dropout: float = 0.0
    """Probability with which an element of the residual stream is dropped; 0 for no dropout."""
    head_only: bool = False
    """Train the head alone on a frozen decoder. Such a run cannot be resumed, since it saves no optimizer state."""

    @classmethod
    def of(cls, config: SFTConfig | RewardTrainingConfig, task: Task, plan: Plan, run: Run) -> Self:
        """Return the training run that a job's settings describe."""
        return cls(
            task=task,
            plan=plan,
            settings=config.fit,
            optimizer=config.optimizer,
            saving=config.checkpoint,
            seed=config.seed,
            run=run,
        )

    def train(self) -> Path:
        """Train to the end, or resume from the run's newest checkpoint.

        Returns:
            the checkpoint of the last step, `<run directory>/checkpoints/step_N`.

        Raises:
            RunStopped: the run was told to end before its last step; its checkpoint is saved.
        """
        task, plan, settings, run = self.task, self.plan, self.settings, self.run
        self.saving.check_best(task.validated)
        batches = GlobalBatches(len(task.train), settings.global_batch_size, seed=self.seed, digest=task.train.digest)
        last = settings.max_steps or len(task.train) // settings.global_batch_size * (settings.epochs or 1)
        self.optimizer.check_decay(last)
        if (warmup := self.optimizer.warmup_steps) >= last:
            run.logger.warning(
                "optimizer.warmup_steps = %d: this run of %d steps never reaches optimizer.lr", warmup, last
            )
        plan.setup.parallel.check_update("global_batch_size", settings.global_batch_size, runtime.world_size())
        runtime.initialize(plan.setup.parallel, self.seed)
        require_same("data.train and data.validation: rows", (task.train.digest, task.validation.digest))
        folder = run.directory / CHECKPOINTS
        resume = checkpoint.verify_newest(folder, task.head, plan.model, plan.setup.precision)
        done = 0
        if resume is not None:
            manifest = checkpoint_files.read_manifest(resume)
            done = manifest.step
            batches.load_state_dict(manifest.state["batches"])  # other data are an error in a finished run, too
            if done >= last:
                run.logger.info(
                    "%s has made %d steps, the settings ask for %d: nothing is left to do", resume, done, last
                )
                return resume
            run.logger.info(RESUMES, resume, done, last)
        runner = build(
            plan,
            task.head,
            latent_size=task.latent_size,
            dropout=self.dropout,
            optimizer=self.optimizer,
            total_steps=last,
            resume=resume,
        )
        if self.head_only:
            train_head_only(runner.chunks, runner.optimizer)
        saver = CheckpointSaver(folder, plan.tokenizer_path, self.saving.asynchronous)
        step = self._steps(runner, batches, saver, done, last)
        if step == last or not self.head_only:
            run.logger.info(SAVED, task.title, step, last, saver.path(step))
        if step < last:
            raise RunStopped
        return saver.path(last)

    def _steps(self, runner: ModelRunner, batches: GlobalBatches, saver: CheckpointSaver, done: int, last: int) -> int:
        """Make the steps after `done`; return the last one made, which is `last` unless the run has to end early."""
        task, run, saving = self.task, self.run, self.saving
        with ExitStack() as stack:
            is_rank0 = dist.get_rank() == 0
            watch = stack.enter_context(StopWatch(run))
            metrics = stack.enter_context(run.open_metrics(done or None)) if is_rank0 else None
            progress = stack.enter_context(Progress(task.title, last, task.columns, done=done, disable=not is_rank0))
            for step in range(done + 1, last + 1):
                row = self._update(runner, next(batches), step)
                if (stop := watch.due()) and step < last:
                    run.logger.info(PROBE_ENDS if self.head_only else ENDS, stop)
                # a linear probe saves no optimizer state: interrupted, it starts again from step 1
                save = step == last or (not self.head_only and (stop or due(step, saving.interval)))
                validation: dict[str, float] = {}
                if save or due(step, self.settings.validation_interval):
                    validation = task.validate(runner)
                    row |= validation
                if metrics is not None:
                    metrics.log(step, row)  # before the checkpoint: resuming can drop rows, not restore them
                if save:
                    manifest = checkpoint_files.Manifest(
                        head=task.head,
                        step=step,
                        model=self.plan.model,
                        metrics=validation,
                        optimizer=not self.head_only,
                        state={"batches": batches.state_dict(), **task.state()},
                    )
                    saver.save(runner, manifest, after=lambda: tidy(run.directory / CHECKPOINTS, saving))
                saver.poll()
                progress.update(step, row)
                if stop:
                    break
            saver.finish()
        return step

    def _update(self, runner: ModelRunner, indices: list[int], step: int) -> dict[str, float]:
        """Train on one global batch, and return the step's metrics."""
        started = time.perf_counter()
        if self.dropout:
            runtime.seed_all(self.seed, step)  # dropout depends on the step alone, also after a resume
        rows = self.task.prepare(self.task.rows(indices), runner, step)
        update = runner.train_step(rows, self.task.loss_function(rows), group=self.task.group)
        row = {f"train/{name}": value for name, value in update.items()}
        row["seconds/step"] = time.perf_counter() - started
        row["train/tokens_per_second"] = float(rows["lengths"].sum()) / row["seconds/step"]
        return row
