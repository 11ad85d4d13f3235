"""Reward functions of the user, run in processes of their own with a time limit.

A reward function takes a Sample and gives a number. The same function serves as a reward to train on (`rewards`) or as
one that is only reported (`gold_reward`).
"""

import contextlib
import dataclasses
import inspect
import json
import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

from nemo_eppo.config import ConfigError, RunError, load_named
from nemo_eppo.files import sha256
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.rewards import FunctionsConfig


class RewardFunctionError(RunError):
    """A reward function raised, gave no finite number, or took too long; the message names the function and the row."""


def check_function(key: str, name: str) -> None:
    """ConfigError, naming the setting `key`, if there is no function of one argument behind "module:function"."""
    found = load_named(key, name, "module:function")
    if isinstance(found, type) or not callable(found):
        raise ConfigError(f"{key} = {name!r} is not a function")
    try:
        inspect.signature(found).bind("sample")
    except TypeError as error:
        raise ConfigError(f"{key} = {name!r}: expected a function of one argument, a Sample: {error}") from None
    except ValueError:  # functions written in C may have no signature
        pass


def source_sha256(name: str) -> str | None:
    """Return the SHA-256 of the file that holds "module:function"; None if it has none."""
    file = inspect.getsourcefile(load_named("function", name, "module:function"))
    return sha256(Path(file)) if file else None


class FunctionPool:
    """Worker processes that call reward functions. Only rank 0 may use it; the processes start with the first calls."""

    def __init__(self, config: FunctionsConfig) -> None:
        self._calls = ThreadPoolExecutor(config.workers)
        self._batches = ThreadPoolExecutor(1)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # as many as there are threads to use them
        for _ in range(config.workers):
            self._idle.put(_Worker(config.time_limit))

    def submit(self, name: str, samples: Sequence[Sample]) -> "Future[list[float]]":
        """Call the function "module:function" for every sample.

        Raises:
            RewardFunctionError: from the future, for the first row at which the function failed; rows that have not
                begun by then are dropped.
        """
        calls = [self._calls.submit(self._call, name, row, sample) for row, sample in enumerate(samples)]
        return self._batches.submit(_together, calls)

    def close(self) -> None:
        """Drop the calls that have not begun, wait for the others, and end the processes."""
        self._calls.shutdown(cancel_futures=True)
        self._batches.shutdown()
        while not self._idle.empty():
            self._idle.get().end()

    def _call(self, name: str, row: int, sample: Sample) -> float:
        worker = self._idle.get()
        try:
            return worker.call(name, sample)
        except RewardFunctionError as error:
            where = f"response {row} of the batch (prompt {sample.prompt[:60]!r})"
            raise RewardFunctionError(f"reward function {name}, {where}: {error}") from None
        finally:
            self._idle.put(worker)


def _together(calls: Sequence["Future[float]"]) -> list[float]:
    try:
        return [call.result() for call in calls]
    finally:
        for call in calls:
            call.cancel()


class _Worker:
    """One process, started when it is needed."""

    def __init__(self, time_limit: float) -> None:
        self._time_limit = time_limit
        self._process: subprocess.Popen[str] | None = None

    def call(self, name: str, sample: Sample) -> float:
        """The number that the function gives for a sample. RewardFunctionError says what it did instead."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_eppo.rewards.function_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # torchrun's SIGTERM to groups is for ranks, which end a step with its rewards
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, as reading will show
            print(json.dumps({"function": name, "sample": dataclasses.asdict(sample)}), file=requests, flush=True)
        in_time = wait([answers.fileno()], self._time_limit)
        if not in_time or not (line := answers.readline()):
            self.end()
            raise RewardFunctionError("ended its process" if in_time else f"took more than {self._time_limit:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise RewardFunctionError(answer["error"])
        return float(answer["value"])

    def end(self) -> None:
        """Kill the process; the next call starts another."""
        if self._process is not None:
            # closes the pipes without reading to their end: a child of the function may hold them open
            with contextlib.suppress(BrokenPipeError), self._process:
                self._process.kill()
            self._process = None
