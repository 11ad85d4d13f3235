"""Writes the metrics of a run, one row per step, to metrics.jsonl (which reports read), TensorBoard and W&B."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from nemo_eppo.config import ConfigError
from nemo_eppo.files import complete_lines, json_line, json_row, write_atomically

FILE_NAME = "metrics.jsonl"
Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Metrics by name, each with its steps and its values, of the same length."""
_RESERVED = ("step", "time")
MEASURES = {  # metrics that pages show over the steps -> title, caption, unit
    "reward/proxy": ("Proxy reward", "What the policy is trained on, before penalties.", "standardised reward"),
    "reward/gold": (
        "Gold reward",
        "The true goal, on which the policy is never trained. A fall while the proxy rises is over-optimisation.",
        "gold reward",
    ),
    "reward/held_out": ("Held-out reward", "Score by a reward model that is not trained on.", "standardised reward"),
    "energy/policy": (
        "Energy loss",
        "Fall of the hidden states' L1 norm in the final layer, over the responses. An excessive rise marks hacking.",
        "energy loss",
    ),
    "kl/policy_reference": ("KL divergence", "How far the policy has moved from the reference.", "nats"),
    "rollout/response_length": ("Response length", "Tokens, the end-of-sequence token included.", "tokens"),
    "rollout/truncated_fraction": (
        "Truncated responses",
        "Share of the rollouts that ended without an end-of-sequence token.",
        "fraction",
    ),
}


class MetricsSink(Protocol):
    """The method of Lightning's loggers, such as WandbLogger, that MetricsLogger calls."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of one step."""


class MetricsLogger:
    """Writes the metrics of one run. Only global rank 0 may open it.

    Args:
        run_dir: the directory of metrics.jsonl and tensorboard/.
        resume_step: the step of the checkpoint that the run resumes from. Rows of later steps are removed, because
            those steps are about to be repeated. None starts anew and removes all rows.
        tensorboard: whether to write TensorBoard scalars too.
        wandb: gets every row too.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb: MetricsSink | None = None,
    ) -> None:
        first_step = 0 if resume_step is None else resume_step + 1
        self.path = run_dir / FILE_NAME
        self._last_step = first_step - 1
        self._wandb = wandb
        self._writer: Any = None
        if self.path.exists():
            kept = [row for row in _read_rows(self.path) if resume_step is not None and row["step"] <= resume_step]
            write_atomically(self.path, "".join(map(json_line, kept)))
        self._file = self.path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second of import, and it brings torch

            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one row, which readers of the file see when this returns.

        Raises:
            FloatingPointError: a value is NaN or infinite. Nothing is written then.
            ValueError: a metric is called "step" or "time", or the step lies before the last one.
        """
        if step < self._last_step:
            raise ValueError(f"metrics of step {step} come after those of step {self._last_step}")
        if clash := [name for name in _RESERVED if name in metrics]:
            raise ValueError(f"a metric cannot be called {clash[0]!r}: every row has a column of that name")
        row = {name: float(value) for name, value in metrics.items()}
        if bad := [f"{name} = {value}" for name, value in row.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"step {step}: not a finite number: {', '.join(bad)}")
        self._last_step = step
        self._file.write(json_line({"step": step, "time": time.time(), **row}))
        self._file.flush()
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        if self._wandb is not None:
            self._wandb.log_metrics(row, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read a metrics.jsonl and return the curve of every metric: its steps and its values, of the same length."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in _read_rows(path):
        for name, value in row.items():
            if name not in _RESERVED:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(complete_lines(path), start=1):
        row = json_row(line, f"{path}:{number}")
        if type(row.get("step")) is not int:
            raise ConfigError(f"{path}:{number}: field 'step' = {row.get('step')!r:.80}: expected a whole number")
        rows.append(row)
    return rows
