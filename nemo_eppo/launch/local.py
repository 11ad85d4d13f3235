"""Runs a launch on this machine: starts its jobs in order, watches them, and ends every process."""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import psutil

from nemo_eppo.config import NOT_FINISHED, ConfigError
from nemo_eppo.launch.command import THREADS, Address, environment, override, overrides, own_address, script, torchrun
from nemo_eppo.launch.gpus import Gpus
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.nursery import ForkedJob, Nursery
from nemo_eppo.launch.status import Row, State, Status
from nemo_eppo.machine import VISIBLE, visible_gpus
from nemo_eppo.observability.run import hold
from nemo_eppo.processes import adopt_orphans, end_with_parent
from nemo_eppo.servers import certificates
from nemo_eppo.servers.ports import free_port

GRACE_S = 30.0  # seconds that a job may take to stop before it is killed
MOST_RESTARTS = 3  # of each server that was ready before; the actor waits for it, and resumes
POLL_S = 0.1  # seconds between looks at the jobs
TAIL_LINES = 25  # lines shown of a failed job's log
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class LaunchError(RuntimeError):
    """A job failed, or the launch was told to stop."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """Exit status of the launch: that of the failed job, or 128 + N for signal N."""


def open_nursery(launch: LaunchConfig) -> Nursery | None:
    """Begin to import what the jobs of a launch need, in a process that forks them; None where jobs may use GPUs,
    which must not be in use when a process forks."""
    on_cpus = not visible_gpus() or launch.environment.get(VISIBLE) == ""
    return Nursery(THREADS | launch.environment) if on_cpus else None


def run_local(launch: LaunchConfig, nursery: Nursery | None = None) -> None:
    """Run all jobs until those that are not servers have ended, or for ever if there are only servers.

    Args:
        nursery: forks the jobs that have no environment of their own; None to start all of them anew.

    Raises:
        ConfigError: a launch with the same output is running, or there are too few GPUs.
        LaunchError: a job failed or a signal came. In any case all jobs have been stopped.
    """
    try:
        hold(launch.output)
    except OSError as error:
        raise ConfigError(f"output = {launch.output}: cannot be made, {error}") from None
    with _stop_signals():
        supervisor = Supervisor(launch, Gpus(launch, visible_gpus()), nursery)
        with Status(supervisor.rows) as status:
            try:
                supervisor.run(status)
            finally:
                _ignore_signals()
                try:
                    status.show()  # the failed job, before the others have stopped
                finally:
                    supervisor.stop(status)


def commands(launch: LaunchConfig) -> list[str]:
    """List the command of every job in shell syntax; a port that only a run knows stands as <port of JOB>."""
    own = {name: own_address(launch, name) for name in launch.servers}
    addresses = {name: replace(a, url=f"grpc://{a.host}:{a.port or f'<port of {name}>'}") for name, a in own.items()}
    return [shlex.join(_argv(launch, name, addresses)) for name in launch.order()]


class Supervisor:
    """Starts, watches and ends the processes of a launch."""

    def __init__(self, launch: LaunchConfig, gpus: Gpus, nursery: Nursery | None = None) -> None:
        self._launch, self._gpus, self._nursery = launch, gpus, nursery
        self._rows = {name: Row(name, launch.jobs[name].ranks, launch.output / name) for name in launch.order()}
        self._logs = launch.output / "logs"
        for name in launch.jobs:
            (self._logs / name).parent.mkdir(parents=True, exist_ok=True)
        self._addresses = {name: _with_port(own_address(launch, name)) for name in launch.servers}
        if launch.servers:
            certificates.create(launch.certificates_folder)
        self._restarts = dict.fromkeys(launch.servers, 0)
        self._processes: dict[str, subprocess.Popen[bytes] | ForkedJob] = {}  # in the order of their start
        self._told_to_stop: dict[str, float] = {}  # monotonic time; servers that no job needs any more
        # Processes that outlive a job become children of this process, so that `stop` finds them.
        adopt_orphans()
        self._strangers = set(psutil.Process().children(recursive=True))  # not ours to kill

    @property
    def rows(self) -> list[Row]:
        """The state of the jobs."""
        return list(self._rows.values())

    def run(self, status: Status) -> None:
        """Run until all jobs that are not servers have ended; LaunchError if a job fails."""
        while not self._finished():
            for name, row in self._rows.items():
                if row.state is State.WAITING and self._may_start(name):
                    self._start(name)
                elif row.state in (State.STARTING, State.READY, State.RUNNING):
                    self._watch(name, status)
            status.show()
            time.sleep(POLL_S)

    def stop(self, status: Status) -> None:
        """Tell all jobs to end, servers last; kill those that do not, and the processes that they leave."""
        self._end(False, State.SAVING, status)
        self._end(True, State.STOPPING, status)
        for _ in range(3):  # processes may start others while they end
            left = [child for child in psutil.Process().children(recursive=True) if child not in self._strangers]
            for straggler in left:
                with suppress(psutil.NoSuchProcess):
                    straggler.kill()
            psutil.wait_procs(left, GRACE_S)
        if any(self._launch.jobs[name].serves and process.poll() for name, process in self._processes.items()):
            from nemo_eppo.servers.frontend import remove_leftovers

            remove_leftovers()  # shared memory of servers that were killed
        self._processes.clear()

    def _end(self, serves: bool, state: State, status: Status) -> None:
        """Tell the servers, or the other jobs, to end, and show their states until all have ended or were killed."""
        deadline = time.monotonic() + GRACE_S
        running = [
            (self._rows[name], process)
            for name, process in self._processes.items()
            if self._launch.jobs[name].serves is serves and process.poll() is None
        ]
        for row, process in running:
            process.terminate()
            row.state, row.deadline = state, deadline
        if running:
            what = "servers end" if serves else "trainings save after the step at hand, then end"
            limit = f"what takes longer than {GRACE_S:.0f} s is killed. Ctrl-C has no effect meanwhile."
            with suppress(OSError):  # nobody reads standard output any more, which must not keep jobs alive
                status.say(f"{what} ({', '.join(row.name for row, _ in running)}); {limit}")
        while running:
            for row, process in running:
                if process.poll() is not None:
                    row.state, row.ended = State.STOPPED, time.monotonic()
                elif time.monotonic() > deadline:
                    row.state, row.ended = State.KILLED, time.monotonic()  # by `stop`, with all that it has started
            running = [(row, process) for row, process in running if row.is_ending]
            with suppress(OSError):
                status.show()
            time.sleep(POLL_S if running else 0)

    def _finished(self) -> bool:
        tasks = [row for name, row in self._rows.items() if not self._launch.jobs[name].serves]
        return bool(tasks) and all(row.state is State.DONE for row in tasks)

    def _may_start(self, name: str) -> bool:
        # a job imports and builds while its servers start, and then waits for them
        serving = (State.STARTING, State.READY)
        return all(
            self._rows[need].state in (serving if self._launch.jobs[need].serves else (State.DONE,))
            for need in self._launch.jobs[name].needs
        )

    def _start(self, name: str) -> None:
        job, row = self._launch.jobs[name], self._rows[name]
        gpus = self._gpus.take(name, job)
        if gpus is None:
            return
        argv = _argv(self._launch, name, self._addresses)
        if job.serves:
            ready = self._ready_file(name)
            ready.unlink(missing_ok=True)
            argv.append(override("server.ready_file", str(ready)))
        file = self._log(name)
        with file.open("a") as log:
            print(f"\n$ {shlex.join(argv)}", file=log, flush=True)
            if self._nursery is not None and not job.environment:
                self._processes[name] = self._nursery.start(argv[len(torchrun(job)) :], job.ranks, file.absolute())
            else:
                self._processes[name] = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment(self._launch, name), **gpus},
                    start_new_session=True,  # Ctrl-C reaches only this process, which ends the jobs in order
                    preexec_fn=partial(end_with_parent, signal.SIGTERM),  # when the launcher itself is killed
                )
        row.state = State.STARTING if job.serves else State.RUNNING
        row.started, row.ended = time.monotonic(), 0.0

    def _watch(self, name: str, status: Status) -> None:
        job, row = self._launch.jobs[name], self._rows[name]
        code = self._processes[name].poll()
        needed_by = [other for other, config in self._launch.jobs.items() if name in config.needs]
        if job.serves and needed_by and all(self._rows[other].state is State.DONE for other in needed_by):
            self._end_unneeded(name)
        elif code is not None:
            row.ended = time.monotonic()
            self._gpus.give_back(name)
            if job.serves and row.url and self._restarts[name] < MOST_RESTARTS:
                self._restarts[name] += 1
                count = f"{self._restarts[name]} of {MOST_RESTARTS}"
                status.say(
                    f"{name}: ended with exit status {code}, is started again ({count}); its log is {self._log(name)}"
                )
                self._start(name)
            elif code == NOT_FINISHED:
                raise self._failure(name, "ended before its last step; the same command resumes it", code)
            elif job.serves or code:
                raise self._failure(name, f"ended with exit status {code}", code if code >= 0 else 128 - code)
            else:
                row.state = State.DONE
        elif row.state is State.STARTING:
            if self._ready_file(name).exists():
                row.url = json.loads(self._ready_file(name).read_text())["url"]
                row.state = State.READY
            elif time.monotonic() - row.started > self._launch.start_timeout:
                raise self._failure(name, f"was not ready after {self._launch.start_timeout:.0f} s", 1)

    def _end_unneeded(self, name: str) -> None:
        """End a server that no job needs any more, without waiting for it."""
        process, now = self._processes[name], time.monotonic()
        if process.poll() is not None:
            self._rows[name].state, self._rows[name].ended = State.STOPPED, now
            self._gpus.give_back(name)
        elif name not in self._told_to_stop:
            self._told_to_stop[name] = now
            process.terminate()
        elif now - self._told_to_stop[name] > GRACE_S:
            process.kill()

    def _failure(self, name: str, what: str, status: int) -> LaunchError:
        self._rows[name].state = State.FAILED
        log = self._log(name)
        lines = log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines(keepends=True)  # of the last start
        # torchrun's report on failed ranks is long, and after its first line repeats what the ranks have printed.
        end = next((number for number, line in enumerate(lines, start=1) if "failed (exitcode: " in line), len(lines))
        tail = "".join(lines[:end][-TAIL_LINES:])
        return LaunchError(f"{tail}\nlaunch: {name} {what}; its log is {log}", status or 1)

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _ready_file(self, name: str) -> Path:
        return (self._logs / f"{name}.ready.json").absolute()


def _argv(launch: LaunchConfig, name: str, addresses: dict[str, Address]) -> list[str]:
    job = launch.jobs[name]
    return [*torchrun(job), script(job), *overrides(launch, name, addresses)]


def _with_port(address: Address) -> Address:
    """Choose a port now, so that clients can be started together with the server."""
    port = free_port(address.host, address.port)
    return replace(address, port=port, url=f"grpc://{address.host}:{port}")


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Raise LaunchError at a signal; SIGINT is set too, because shells ignore it for background processes."""

    def interrupted(number: int, _: FrameType | None) -> None:
        _ignore_signals()
        raise LaunchError(
            f"launch: {signal.Signals(number).name}, all jobs were stopped; the same command resumes them", 128 + number
        )

    previous = {number: signal.signal(number, interrupted) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
