"""Reward functions of the user, run in processes of their own with a time limit.

A reward function takes a Sample and gives a number. The same function serves as a reward to train on (`rewards`) or as
one that is only reported (`gold_reward`).
"""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import IO, Any

from pydantic import Field

from nemo_eppo.config import Config, ConfigError, load_named
from nemo_eppo.rewards.sample import Sample


class RewardFunctionError(RuntimeError):
    """A reward function raised, gave no finite number, or took too long; names the function and the row."""


class FunctionsConfig(Config):
    """The processes that reward functions run in."""

    workers: int = Field(1, ge=1)
    """Processes on the first rank's machine; each takes one response at a time."""
    time_limit: float = Field(60.0, gt=0)
    """Seconds that one call may take; a longer one stops the step."""


def check_function(key: str, name: str) -> None:
    """ConfigError, naming the setting `key`, if there is no function behind "module:function"."""
    if not callable(load_named(key, name, "module:function")):
        raise ConfigError(f"{key} = {name!r} is not a function")


class FunctionPool:
    """Worker processes that call reward functions; for one process, rank 0. They start with the first call."""

    def __init__(self, config: FunctionsConfig) -> None:
        self._config = config
        self._calls: queue.SimpleQueue[Callable[[_Worker], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, name: str, samples: Sequence[Sample]) -> "Future[list[float]]":
        """Call the function "module:function" for every sample.

        Raises:
            RewardFunctionError: from the future, for the first sample at which the function failed.
        """
        if not self._threads:
            self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self._config.workers)]
            for thread in self._threads:
                thread.start()
        together: Future[list[float]] = Future()
        values: list[float | None] = [None] * len(samples)
        lock = threading.Lock()

        def call(worker: "_Worker", row: int) -> None:
            if together.done():  # another row has failed
                return
            try:
                values[row] = worker.call(name, samples[row], self._config.time_limit)
            except RewardFunctionError as error:
                with lock:
                    if not together.done():
                        together.set_exception(_named(error, name, row, samples[row]))
                return
            with lock:
                if not together.done() and None not in values:
                    together.set_result([value for value in values if value is not None])

        for row in range(len(samples)):
            self._calls.put(lambda worker, row=row: call(worker, row))  # type: ignore[misc]
        return together

    def close(self) -> None:
        """End the processes."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        worker = _Worker()
        while (call := self._calls.get()) is not None:
            call(worker)
        worker.end()


class _Worker:
    """One process, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def call(self, name: str, sample: Sample, time_limit: float) -> float:
        """The function's number for a sample. RewardFunctionError says what it did instead."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_eppo.rewards.function_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        process, overtime = self._process, threading.Event()
        assert process.stdin is not None
        assert process.stdout is not None

        def stop() -> None:
            overtime.set()
            process.kill()

        timer = threading.Timer(time_limit, stop)
        timer.start()
        try:
            answer = _ask(process.stdin, process.stdout, {"function": name, "sample": dataclasses.asdict(sample)})
        finally:
            timer.cancel()
        if answer is None:
            self.end()
            how = f"took more than {time_limit:g} s" if overtime.is_set() else "ended its process"
            raise RewardFunctionError(how)
        if "error" in answer:
            raise RewardFunctionError(answer["error"])
        return float(answer["value"])

    def end(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _ask(requests: IO[str], answers: IO[str], request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer to a request; None if the process ended instead."""
    try:
        print(json.dumps(request), file=requests, flush=True)
        line = answers.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line else None


def _named(error: RewardFunctionError, name: str, row: int, sample: Sample) -> RewardFunctionError:
    beginning = sample.prompt if len(sample.prompt) <= 60 else sample.prompt[:57] + "..."
    return RewardFunctionError(f"reward function {name}, response {row} of the batch (prompt {beginning!r}): {error}")
