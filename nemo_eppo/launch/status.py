"""Shows the state of a running launch: a live table on a terminal, else a line for each change."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from rich.live import Live
from rich.table import Table

from nemo_eppo.observability.metrics import FILE_NAME
from nemo_eppo.observability.progress import PPO_COLUMNS, clock

LINE_INTERVAL_S = 5.0  # seconds between lines with a job's metrics
_TAIL_BYTES = 65536  # read from the end of the metrics, more than their last row


class State(StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SAVING = "saving"
    """Told to end: a training finishes its step and saves."""
    STOPPING = "stopping"
    """Told to end: a server."""
    STOPPED = "stopped"
    KILLED = "killed"
    """It did not end in time when it was told to."""


_STYLES = {State.READY: "green", State.DONE: "green", State.RUNNING: "cyan", State.FAILED: "bold red"}
_STYLES |= {State.SAVING: "yellow", State.STOPPING: "yellow", State.KILLED: "bold red"}
_ENDED = (State.DONE, State.FAILED, State.STOPPED, State.KILLED)


@dataclass
class Row:
    """One job as it is shown."""

    name: str
    ranks: int
    directory: Path
    """Its run directory, whose metrics are shown."""
    state: State = State.WAITING
    started: float = 0.0
    """Monotonic time in seconds; 0 before the start."""
    ended: float = 0.0
    """Monotonic time in seconds; 0 before the end."""
    url: str = ""
    """Address of a server that is ready."""
    deadline: float = 0.0
    """Monotonic time in seconds at which a job that was told to end is killed."""

    @property
    def is_ending(self) -> bool:
        return self.state in (State.SAVING, State.STOPPING)

    def state_text(self) -> str:
        left = f", at most {max(0.0, self.deadline - time.monotonic()):.0f} s more" if self.is_ending else ""
        return f"{self.state}{left}"

    def uptime(self) -> str:
        return clock((self.ended or time.monotonic()) - self.started) if self.started else ""

    def metrics(self) -> str:
        """Return the newest row of its metrics: step and the columns of PPO, or the first two values of another job;
        nothing of an earlier start."""
        try:
            begun = time.time() - (time.monotonic() - self.started)
            if not self.started or (self.directory / FILE_NAME).stat().st_mtime < begun:
                return ""
            with (self.directory / FILE_NAME).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
                row = json.loads(file.read().splitlines()[-1])
        except (OSError, IndexError, ValueError):  # there is no row yet, or it is being written
            return ""
        shown = {label: row[name] for label, name in PPO_COLUMNS.items() if name in row}
        others = [(name, value) for name, value in row.items() if name not in ("step", "time")]
        values = "  ".join(f"{label} {value:.4g}" for label, value in (shown.items() or others[:2]))
        return f"step {row['step']}  {values}"


class Status:
    """Shows the jobs on standard output; use it as a context manager."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._start = rows, time.monotonic()
        self._live = Live(auto_refresh=False) if sys.stdout.isatty() else None
        self._told: dict[str, tuple[State, str]] = {}
        self._next_line = 0.0

    def show(self) -> None:
        """Show all changes since the last call."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            return
        with_metrics = time.monotonic() >= self._next_line
        if with_metrics:
            self._next_line = time.monotonic() + LINE_INTERVAL_S
        for row in self._rows:
            state, metrics = self._told.get(row.name, (State.WAITING, ""))
            changed = row.state is not state
            if changed or (with_metrics and row.is_ending):
                self._next_line = time.monotonic() + LINE_INTERVAL_S
                self._line(row, f"{row.state_text()} {row.url if row.state is State.READY else ''}".rstrip())
            ended = changed and row.state in _ENDED
            if (with_metrics and row.state is State.RUNNING) or ended:
                newest = row.metrics()
                if newest != metrics:
                    self._line(row, newest)
                metrics = newest
            self._told[row.name] = row.state, metrics

    def say(self, text: str) -> None:
        """Show a sentence above the table, or on a line of its own."""
        if self._live is not None:
            self._live.console.print(text)
        else:
            print(f"[{time.monotonic() - self._start:4.0f} s] {text}", flush=True)

    def _line(self, row: Row, text: str) -> None:
        self.say(f"{row.name}: {text}")

    def _table(self) -> Table:
        table = Table("job", "state", "ranks", "address", "up", "metrics")
        for row in self._rows:
            style = _STYLES.get(row.state, "dim")
            state = f"[{style}]{row.state_text()}[/]"
            table.add_row(row.name, state, str(row.ranks), row.url, row.uptime(), row.metrics())
        return table

    def __enter__(self) -> "Status":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show()
        if self._live is not None:
            self._live.stop()
