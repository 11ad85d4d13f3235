"""Shows the progress of a training loop: a live bar on a terminal, plain lines in a log, at least one every 30 s."""

import sys
import threading
import time
from collections.abc import Callable, Mapping
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
_LINE_STEPS = 10  # without a terminal, every tenth step and the last one get a line
_QUIET_S = 30.0  # seconds without a line after which one names the running phase


class Progress:
    """Shows steps, some metrics and the time left on standard output. It is a context manager.

    Args:
        title: name of the training, e.g. "PPO".
        total: the number of the last step.
        columns: the metrics to show, as labels and names. A metric that a step does not have is left out.
        done: number of steps that were done before a resumed job started.
        disable: whether to show nothing, as on ranks other than 0.
        phase: returns the running phase of the step and its seconds so far, None if unknown; called from a thread.
    """

    def __init__(
        self,
        title: str,
        total: int,
        columns: Mapping[str, str],
        done: int = 0,
        disable: bool = False,
        phase: Callable[[], tuple[str, float] | None] = lambda: None,
    ) -> None:
        self._title, self._total, self._columns = title, total, columns
        self._done, self._disable, self._phase = done, disable, phase
        self._start = self._last_line = self._step_start = time.perf_counter()
        self._step = done
        self._ended = threading.Event()
        self._reminder: threading.Thread | None = None
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
        self._step, self._step_start = step, time.perf_counter()
        if self._live is not None:
            self._live.update(self._task, completed=step, metrics=text)
        elif not self._disable and (step % _LINE_STEPS == 0 or step == self._total):
            seconds = (time.perf_counter() - self._start) / max(step - self._done, 1)
            left = clock(seconds * (self._total - step))
            self._print_line(f"{step}/{self._total}  {text}  {seconds:.2f} s/step  {left} left")

    def _print_line(self, text: str) -> None:
        self._last_line = time.perf_counter()
        print(f"{self._title} {text}", flush=True)

    def _remind(self) -> None:
        """Print a line whenever there was none for `_QUIET_S`; runs in a thread of its own."""
        while not self._ended.wait(self._last_line + _QUIET_S - time.perf_counter()):
            now = time.perf_counter()
            if now - self._last_line >= _QUIET_S:
                phase = self._phase()
                phase_text = f", {phase[0]} for {phase[1]:.0f} s" if phase else ""
                activity = f"step {self._step + 1}/{self._total}" if self._step < self._total else "is saving"
                self._print_line(f"{activity}: {now - self._step_start:.0f} s so far{phase_text}")

    def __enter__(self) -> "Progress":
        self._start = self._last_line = self._step_start = time.perf_counter()
        if self._live is not None:
            self._live.start()
        elif not self._disable:
            self._reminder = threading.Thread(target=self._remind, name="progress", daemon=True)
            self._reminder.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        if self._reminder is not None:
            self._ended.set()
            self._reminder.join()


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def clock(seconds: float) -> str:
    """Return a duration as H:MM:SS, or as M:SS below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
