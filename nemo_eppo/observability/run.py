"""The run directory of a job: its lock, its number, and the objects that every part of the job is given."""

import errno
import fcntl
import logging
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.files import write_atomically
from nemo_eppo.observability.metrics import MetricsLogger, MetricsSink
from nemo_eppo.settings.run import ExpManagerConfig

LOCK = "run.lock"
"""File of a run directory that its job locks; its text names the last job that did."""


def hold(directory: Path) -> None:
    """Lock `directory`, which is made if missing, for this process until it ends in any way: one job runs in it.

    A POSIX record lock belongs to the process alone: forked children that outlive it do not keep the lock. Other
    machines see it on NFS version 4, and on Lustre mounted with `flock`; a file system without locks causes a warning.

    Raises:
        ConfigError: another process holds the lock; the message names that process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # not closed: that would give the lock up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            risk = "a second job in it will not be noticed"
            print(f"warning: {directory} cannot be locked ({error.strerror}): {risk}", file=sys.stderr, flush=True)
            return
        holder = os.pread(file, 1000, 0).decode(errors="replace") or "that has just started"
        os.close(file)
        raise ConfigError(
            f"{directory} is in use by another job ({holder}): wait for it, end it, or choose another run directory"
        ) from None
    os.ftruncate(file, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    os.pwrite(file, f"host {socket.gethostname()}, process {os.getpid()}, started {started}".encode(), 0)


def run_id(directory: Path) -> int:
    """Return the random number that identifies the run in `directory`, resumed or not. For rank 0 only."""
    path = directory / "run_id"
    if not path.exists():
        write_atomically(path, f"{secrets.randbits(62)}\n")
    return int(path.read_text())


@dataclass(frozen=True)
class Run:
    """Directory, rank, logger and settings of a running job."""

    directory: Path
    """The run directory. Only rank 0 writes to it; its config.yaml holds the checked settings."""
    rank: int
    """Global rank of this process."""
    logger: logging.Logger
    """Writes to the console, and on rank 0 to log.txt too. Other ranks show warnings and errors only."""
    settings: ExpManagerConfig
    """The settings that determine the directory."""
    wandb: MetricsSink | None = None
    """Sends metrics to Weights & Biases; None if not configured, and on ranks other than 0."""
    started: float = field(default_factory=time.monotonic)
    """When the job started, in seconds of time.monotonic()."""

    def open_metrics(self, resume_step: int | None = None) -> MetricsLogger:
        """Open the metrics of this run; to be called on rank 0 only. For `resume_step`, see MetricsLogger."""
        return MetricsLogger(self.directory, resume_step, self.settings.create_tensorboard_logger, self.wandb)
