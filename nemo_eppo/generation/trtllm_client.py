"""Starts the process of a TensorRT-LLM engine and talks to it."""

import os
import subprocess
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from socket import SHUT_RDWR, socketpair
from typing import Any

from nemo_eppo.generation.refit import RefitError
from nemo_eppo.generation.trtllm_checks import engine_environment
from nemo_eppo.settings.generation import TensorRTLLMConfig

_LOG_TAIL = 3000  # characters


class EngineProcessError(RuntimeError):
    """The engine's process failed at a request, or ended."""


class EngineProcess:
    """The process of one engine, which sees only these GPUs and writes its output to `log`."""

    def __init__(self, config: TensorRTLLMConfig, gpus: list[str], log: Path) -> None:
        self._log, self._timeout = log, config.timeout_minutes * 60
        self._pending: list[str] = []  # commands that were sent and not answered yet
        self._socket, theirs = socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [config.interpreter, "-m", "nemo_eppo.generation.trtllm_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=engine_environment(config, gpus),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # torchrun signals groups; this ends when its socket is closed
            )
        self._connection = Connection(os.dup(self._socket.fileno()))

    def ask(self, command: str, arguments: dict[str, Any]) -> Any:
        """Send one request and return its answer; answers to earlier requests that are still due are dropped.

        Raises: see `answer`.
        """
        while self._pending:
            with suppress(RefitError, EngineProcessError):
                self.answer()
        self.send(command, arguments)
        return self.answer()

    def send(self, command: str, arguments: dict[str, Any]) -> None:
        """Send one request without waiting for its answer; EngineProcessError if the process has ended."""
        try:
            self._connection.send((command, arguments))
        except OSError:
            raise self._ended(command) from None
        self._pending.append(command)

    def answer(self) -> Any:
        """Wait for the answer to the oldest pending request.

        Raises:
            RefitError: the process refused a refit.
            EngineProcessError: the request failed, was not answered in time, or the process has ended.
        """
        command = self._pending.pop(0)
        try:
            if not self._connection.poll(self._timeout):
                self.close()
                raise EngineProcessError(f"'{command}' was not answered within {self._timeout:g} s; log: {self._log}")
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended(command) from None
        if answer[0] == "done":
            return answer[1]
        _, kind, message = answer
        if kind == RefitError.__name__:
            raise RefitError(message)
        raise EngineProcessError(f"'{command}' failed: {kind}: {message}; log: {self._log}")

    def close(self) -> None:
        """Close the connection, which ends the process; kill it if it has not ended after 30 s."""
        with suppress(OSError):
            self._socket.shutdown(SHUT_RDWR)  # forked children, such as checkpoint writers, may hold copies
        self._socket.close()
        self._connection.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self, command: str) -> EngineProcessError:
        self.close()
        tail = self._log.read_text(errors="replace")[-_LOG_TAIL:]
        return EngineProcessError(
            f"the engine's process ended at '{command}' with exit code {self._process.returncode}; "
            f"{self._log} ends with:\n{tail}"
        )
