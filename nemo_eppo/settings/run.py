"""Where the files of a run go, and how long it may run."""

import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from nemo_eppo.config import Config


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
    """Whether to send settings and metrics to Weights & Biases. A resumed run continues its curves."""
    wandb_logger_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of Lightning's WandbLogger. name and project are required; id is the run's own unless it is set."""

    @model_validator(mode="after")
    def _wandb_is_named(self) -> "ExpManagerConfig":
        if self.create_wandb_logger and not {"name", "project"} <= self.wandb_logger_kwargs.keys():
            raise ValueError("create_wandb_logger = true needs wandb_logger_kwargs with name and project")
        return self

    @field_validator("max_time_per_run", mode="before")
    @classmethod
    def _is_a_time(cls, value: Any) -> Any:
        if value is not None and not re.fullmatch(r"\d+:\d{2}:\d{2}:\d{2}", str(value)):
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
