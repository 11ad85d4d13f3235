"""A job's run directory: its settings, and what the job knows about it."""

import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from nemo_eppo.config import Config
from nemo_eppo.observability.metrics import MetricsLogger, MetricsSink


class ExpManagerConfig(Config):
    """Where the files of the run go: NeMo's `exp_manager` section, as far as this package uses it."""

    explicit_log_dir: Path | None = None
    """The run directory itself; exp_dir, name and version are then not used."""
    exp_dir: Path = Path("nemo_experiments")
    """Holds the directories of all experiments."""
    name: str = "default"
    """Experiment; the run directory is exp_dir/name, or exp_dir/name/version."""
    version: str | None = None
    """One of several runs of an experiment."""
    resume_if_exists: bool = True
    """Go on with the run that the directory holds. If false, such a directory is an error."""
    max_time_per_run: str | None = None
    """DD:HH:MM:SS after which the job saves and ends, so that the same command can go on later; null for no limit."""
    create_tensorboard_logger: bool = True
    """Write TensorBoard scalars to <run directory>/tensorboard."""
    create_wandb_logger: bool = False
    """Send the metrics to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of Lightning's WandbLogger; name and project are required."""

    @model_validator(mode="after")
    def _wandb_is_named(self) -> "ExpManagerConfig":
        if self.create_wandb_logger and not {"name", "project"} <= self.wandb_logger_kwargs.keys():
            raise ValueError("create_wandb_logger = true needs wandb_logger_kwargs with name and project")
        return self

    @field_validator("max_time_per_run")
    @classmethod
    def _is_a_time(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+:\d{2}:\d{2}:\d{2}", value):
            raise ValueError("expected DD:HH:MM:SS, 00:03:50:00 for instance")
        return value

    @property
    def max_seconds(self) -> float | None:
        """`max_time_per_run` as a number."""
        if self.max_time_per_run is None:
            return None
        days, hours, minutes, seconds = map(int, self.max_time_per_run.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @property
    def directory(self) -> Path:
        """The run directory, the same on every rank and for every restart."""
        chosen = self.explicit_log_dir or self.exp_dir / self.name / (self.version or "")
        return chosen.expanduser().absolute()


@dataclass(frozen=True)
class Run:
    """What a job knows about itself. Only rank 0 writes to `directory`; its config.yaml holds the checked settings."""

    directory: Path
    rank: int
    logger: logging.Logger
    settings: ExpManagerConfig
    wandb: MetricsSink | None = None
    started: float = field(default_factory=time.monotonic)
    """On the monotonic clock."""

    def open_metrics(self, resume_step: int | None = None) -> MetricsLogger:
        """The metrics of this run, for rank 0; `resume_step` as in MetricsLogger."""
        return MetricsLogger(self.directory, resume_step, self.settings.create_tensorboard_logger, self.wandb)
