"""Shows the progress of a training loop: as a live bar on a terminal, as plain lines in a log file."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PPO_COLUMNS = {
    "reward": "reward/final",
    "gold": "reward/gold",
    "energy loss": "energy/policy",
    "KL": "kl/policy_reference",
    "tokens/s": "rollout/tokens_per_second",
}
_EVERY = 10  # without a terminal, every tenth step gets a line, and the last one


class Progress:
    """Shows steps, some metrics and the time left on standard output. It is a context manager.

    Args:
        title: what is being done, e.g. "PPO".
        total: the number of the last step.
        columns: the metrics to show, as labels and names. A metric that a step does not have is left out.
        done: number of steps that were done before a resumed job started.
        disable: whether to show nothing, as on ranks other than 0.
    """

    def __init__(
        self,
        title: str,
        total: int,
        columns: Mapping[str, str],
        done: int = 0,
        disable: bool = False,
    ) -> None:
        self._title, self._total, self._columns = title, total, columns
        self._done, self._disable = done, disable
        self._start = time.perf_counter()
        self._live: RichProgress | None = None
        if sys.stdout.isatty() and not disable:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._live.add_task(title, total=total, completed=done, metrics="")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` is done, with its metrics."""
        shown = {label: metrics[name] for label, name in self._columns.items() if name in metrics}
        text = "  ".join(f"{label} {_short(value)}" for label, value in shown.items())
        if self._live is not None:
            self._live.update(self._task, completed=step, metrics=text)
        elif not self._disable and (step % _EVERY == 0 or step == self._total):
            seconds = (time.perf_counter() - self._start) / max(step - self._done, 1)
            left = _clock(seconds * (self._total - step))
            print(f"{self._title} {step}/{self._total}  {text}  {seconds:.2f} s/step  {left} left", flush=True)

    def __enter__(self) -> "Progress":
        self._start = time.perf_counter()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
