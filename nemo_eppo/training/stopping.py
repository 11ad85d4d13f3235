"""Ends a run early, between two steps and with a checkpoint: on a signal, or when its time is up."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

from nemo_eppo.megatron import device
from nemo_eppo.observability.run import Run

# srun forwards SIGUSR1 to the ranks that it has started; at SIGTERM it kills them.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Log lines of all training loops: at a resume, at the end, and where a run ends before its last step.
RESUMES = "resumes from %s, step %d of %d"
SAVED = "%s ended after step %d of %d; its checkpoint is %s"
ENDS = "%s: saving, then ending. The same command resumes from here."
PROBE_ENDS = "%s: ending. A linear probe is not saved, the same command begins it anew."


class StopWatch:
    """Tells after each step whether the run should end there. Inside its `with` block SIGTERM, SIGUSR1 and the first
    Ctrl-C do not end the process; a second Ctrl-C ends it at once.

    Time is up when another step as long as the longest so far would exceed `exp_manager.max_time_per_run`.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._limit = run, run.settings.max_seconds
        self._signal = 0
        self._step_began, self._longest_step = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, previous in self._previous.items():
            if previous is not signal.SIG_IGN:  # a shell starts background processes with Ctrl-C ignored
                signal.signal(number, self._on_signal)
        self.begin()
        return self

    def begin(self) -> None:
        """Begin to time a step."""
        self._step_began = time.monotonic()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])

    @property
    def signalled(self) -> bool:
        """Whether a signal has told this rank to end."""
        return self._signal != 0

    def told(self) -> bool:
        """Return whether a signal has told any rank to end; collective."""
        vote = torch.tensor(self.signalled, dtype=torch.int32, device=device.device())
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return bool(vote)

    def due(self) -> str:
        """Return why to save and end now; "" to continue. Call it after each step on all ranks, which get the same
        answer."""
        now = time.monotonic()
        self._longest_step, self._step_began = max(self._longest_step, now - self._step_began), now
        late = self._limit is not None and now - self._run.started + self._longest_step > self._limit
        votes = torch.tensor([self._signal, late], dtype=torch.int32, device=device.device())
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        number, late = votes.tolist()
        if number:
            return signal.Signals(number).name
        return f"exp_manager.max_time_per_run = {self._run.settings.max_time_per_run}" if late else ""
