"""The run directory of a job: the settings that choose it, and what the job knows while it runs."""

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
"""File of a run directory that its job locks; it names the job that locked it last."""


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


def run_id(directory: Path) -> int:
    """Return the random number of the run in `directory`, the same at each of its starts. For rank 0 only."""
    path = directory / "run_id"
    if not path.exists():
        write_atomically(path, f"{secrets.randbits(62)}\n")
    return int(path.read_text())


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
