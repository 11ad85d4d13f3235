"""Jobs of a machine without GPUs are forked from one process that has imported everything.

The imports of a rank (torch, megatron-core, NeMo) take 8 s of CPU time and 600 MB. A forked rank starts in a moment and
shares this memory. Python's forkserver does the work: it imports, computes nothing, and so has no threads to lose.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from nemo_eppo.entry.torchrun import run_forked
from nemo_eppo.processes import end_with_parent, environment

_PRELOADED = "nemo_eppo.launch.preloaded"
_TITLE_ROOM = "NEMO_EPPO_TITLE_ROOM"  # a process title has room for as much as arguments and environment took


class ForkedJob:
    """A job's first process, with the methods of `subprocess.Popen` that a supervisor needs."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """Its process, which is the first of a group of its own."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return its exit status, -N if signal N ended it; None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


class Nursery:
    """Forks jobs. Its process begins to import at once, while this one goes on.

    Args:
        variables: environment variables of all jobs, in addition to this process's own.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = dict(variables)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([_PRELOADED])
        with environment({**variables, _TITLE_ROOM: " " * 4096}):
            multiprocessing.forkserver.ensure_running()

    def start(self, command: Sequence[str], ranks: int, log: Path) -> ForkedJob:
        """Run a script with its arguments, on several ranks as torchrun does; output goes to `log`."""
        process = self._context.Process(target=_job, args=(tuple(command), ranks, log, self._variables))
        ours = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # a job does not import the launcher's script
        try:
            process.start()
        finally:
            sys.modules["__main__"] = ours
        return ForkedJob(process)


def _job(command: tuple[str, ...], ranks: int, log: Path, variables: Mapping[str, str]) -> None:
    """Become a job's first process."""
    os.setsid()  # Ctrl-C reaches only the launcher, which ends the jobs in order
    # The nursery, and jobs with it, ends when nobody holds this end of its pipe any more, as after a launcher's kill.
    end_with_parent(signal.SIGTERM)
    server: Any = multiprocessing.forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None
    # a job's own tracker cleans up as soon as the job ends
    tracker: Any = multiprocessing.resource_tracker._resource_tracker
    os.close(tracker._fd)
    tracker._fd = tracker._pid = None
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.pop(_TITLE_ROOM, None)
    os.environ.update(variables)  # a second nursery of this process has the forkserver of the first
    rank = partial(_run_script, command)
    if ranks == 1:
        rank()
        return
    setproctitle(" ".join([sys.executable, "-m", "nemo_eppo.entry.torchrun", *command]))
    rank.__name__ = rank.__qualname__ = Path(command[0]).stem  # type: ignore[attr-defined]
    run_forked(ranks, rank)


def _run_script(command: tuple[str, ...]) -> None:
    setproctitle(" ".join([sys.executable, *command]))
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
