"""The run directory of a job: the settings that choose it, and what the job knows while it runs."""

import errno
import fcntl
import logging
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.observability.metrics import MetricsLogger, MetricsSink

LOCK = "run.lock"
"""File of a run directory that its job locks; it names the job that locked it last."""


class ExpManagerConfig(Config):
    """Where the files of the run go and how long it may run: the part of NeMo's `exp_manager` that is used here."""

    explicit_log_dir: Path | None = None
    """The run directory itself. If it is set, exp_dir, name and version are not used."""
    exp_dir: Path = Path("nemo_experiments")
    """Directory that holds the directories of all experiments."""
    name: str = "default"
    """Name of the experiment. The run directory is exp_dir/name, or exp_dir/name/version if there is a version."""
    version: str | None = None
    """Name of this run, if the experiment has several."""
    resume_if_exists: bool = True
    """Whether to resume the run that the directory holds. If false, a directory that holds a run is an error."""
    may_change: tuple[str, ...] = ()
    """Settings that a resumed run may have otherwise than it was started with, although they make another run out of
    it: keys, or patterns such as data.*. How long it runs, optimizer, layout and addresses may always change."""
    max_time_per_run: str | None = None
    """DD:HH:MM:SS after which the job saves and ends; the same command resumes it later. null sets no limit."""
    create_tensorboard_logger: bool = True
    """Whether to write the metrics to <run directory>/tensorboard."""
    create_wandb_logger: bool = False
    """Whether to send the metrics to Weights & Biases."""
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of Lightning's WandbLogger. name and project are required."""

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
        """`max_time_per_run` in seconds; None for no limit."""
        if self.max_time_per_run is None:
            return None
        days, hours, minutes, seconds = map(int, self.max_time_per_run.split(":"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    @property
    def directory(self) -> Path:
        """The run directory as an absolute path. It is the same on every rank and for every restart."""
        chosen = self.explicit_log_dir or self.exp_dir / self.name / (self.version or "")
        return chosen.expanduser().absolute()


def hold(directory: Path) -> None:
    """Make this process the only one that runs a job in `directory`, which is made, until it ends, however it ends.

    It is a record lock, which is the process's own: its forked children do not hold it when it is gone. Other machines
    see it on NFS version 4, and on Lustre that is mounted with `flock`; a file system without locks gets a warning.

    Raises:
        ConfigError: another process holds it; the message names that.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # not closed: that would give the lock up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            unseen = "a second job in it will not be noticed"
            print(f"warning: {directory} cannot be locked ({error.strerror}): {unseen}", file=sys.stderr, flush=True)
            return
        holder = os.pread(file, 1000, 0).decode(errors="replace") or "that has just started"
        os.close(file)
        raise ConfigError(
            f"{directory} is in use by another job ({holder}): wait for it, end it, or choose another run directory"
        ) from None
    os.ftruncate(file, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    os.pwrite(file, f"host {socket.gethostname()}, process {os.getpid()}, started {started}".encode(), 0)


@dataclass(frozen=True)
class Run:
    """What a job knows about itself while it runs."""

    directory: Path
    """The run directory. Only rank 0 writes to it; its config.yaml holds the checked settings."""
    rank: int
    """Global rank of this process."""
    logger: logging.Logger
    """Writes to the console, and on rank 0 to log.txt too. Other ranks show warnings and errors only."""
    settings: ExpManagerConfig
    """The settings that chose the directory."""
    wandb: MetricsSink | None = None
    """Sends metrics to Weights & Biases; None if that is not asked for, and on ranks other than 0."""
    started: float = field(default_factory=time.monotonic)
    """When the job started, in seconds of time.monotonic()."""

    def open_metrics(self, resume_step: int | None = None) -> MetricsLogger:
        """Open the metrics of this run; to be called on rank 0 only. For `resume_step`, see MetricsLogger."""
        return MetricsLogger(self.directory, resume_step, self.settings.create_tensorboard_logger, self.wandb)
