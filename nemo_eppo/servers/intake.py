"""The queue of requests on rank 0: Triton's threads check them and wait until the main thread has the answer."""

import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_eppo.files import write_json
from nemo_eppo.servers.frontend import Frontend
from nemo_eppo.servers.protocol import (
    PROTOCOL_VERSION,
    STATUS,
    Endpoint,
    Limits,
    RequestError,
    ServerEnding,
    ServiceError,
    json_array,
)
from nemo_eppo.servers.service import Service, Tensors
from nemo_eppo.servers.steps import Steps
from nemo_eppo.settings.servers import ServerConfig

logger = logging.getLogger(__name__)


@dataclass
class Request:
    """A valid request on its way through the main thread."""

    endpoint: str
    tensors: Tensors
    result: "Future[Any]" = field(default_factory=Future)
    """The result of the service, or the error that the client gets."""


class Intake:
    """Takes the requests for one service; `next_request` and `resolve` are for the main thread.

    Args:
        endpoints: the specification of the service's endpoints, by name; others in it are ignored.
    """

    def __init__(self, service: Service, endpoints: Mapping[str, Endpoint], config: ServerConfig) -> None:
        self._service, self._config, self._steps = service, config, Steps(service)
        self._instance = secrets.token_hex(8)
        self._limits = Limits(service.vocab_size, service.max_sequence_length, config.max_batch_size)
        # `status` comes last: once it answers, so do the others.
        self._endpoints = {name: endpoints[name] for name in service.endpoints} | {"status": STATUS}
        self._frontend = Frontend(self._endpoints, self._answer, config.host, config.port, config.certificates)
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._current: Request | None = None
        self._closed = threading.Event()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Accept requests; at the end, answer all that are left with an error, then stop Triton."""
        ready = self._config.ready_file
        if ready:
            ready.parent.mkdir(parents=True, exist_ok=True)
            ready.unlink(missing_ok=True)
        with self._frontend.running() as url:
            try:
                if ready:
                    content = {"url": url, "pid": os.getpid(), "job": self._service.name, "protocol": PROTOCOL_VERSION}
                    write_json(ready, content)
                logger.info("%s server listens on %s", self._service.name, url)
                yield
            finally:
                if ready:
                    ready.unlink(missing_ok=True)
                self._close()

    def _close(self) -> None:
        self._closed.set()
        if self._current and not self._current.result.done():
            self._current.result.set_exception(ServerEnding(f"{self._current.endpoint} ended the server; see its log"))
        self._reject_waiting("the server is stopping")

    def _restart(self) -> None:
        """Start Triton anew. Waiting requests are not executed: their clients get no answer and send them again."""
        self._frontend.end()
        self._closed.set()
        self._reject_waiting("Triton has ended")
        self._frontend.stop()
        self._reject_waiting("Triton has ended")  # those that arrived meanwhile
        self._closed.clear()
        self._frontend.start()

    def _reject_waiting(self, why: str) -> None:
        """Answer all waiting requests with an error, because Triton ends only after them."""
        while not self._waiting.empty():
            self._waiting.get().result.set_exception(ServerEnding(why))

    def _answer(self, name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return a request's outputs, or `error`. Every endpoint calls it in a thread of its own."""
        endpoint = self._endpoints[name]
        try:
            if endpoint is STATUS:
                return endpoint.answer(self._status())
            endpoint.validate(arrays, self._limits)
            request = Request(name, endpoint.decode(arrays))
            self._waiting.put(request)
            if self._closed.is_set():  # after `put`, so that `_close` cannot miss both
                raise ServerEnding("the server is stopping")
            return endpoint.answer(request.result.result())
        except ServiceError as error:
            return {"error": json_array(error.payload())}
        except Exception:
            logger.exception("%s failed", name)
            return {"error": json_array(ServiceError(f"{name} failed inside the server; see its log").payload())}

    def _status(self) -> dict[str, Any]:
        current = self._current
        return {
            "protocol": PROTOCOL_VERSION,
            "job": self._service.name,
            "instance": self._instance,
            "step": self._service.step,
            "healthy": not self._closed.is_set(),
            "busy": current.endpoint if current else "",
            "max_batch_size": self._limits.max_batch_size,
            "max_sequence_length": self._limits.max_sequence_length,
            "vocab_size": self._limits.vocab_size,
            "endpoints": list(self._service.endpoints),
            **self._service.status(),
        }

    def next_request(self, timeout: float) -> Request | None:
        """Return the next request that all ranks have to execute, or None after `timeout` seconds without one.

        A request that its step rule refuses, or that was answered before, is answered here.

        A Triton that has ended is started anew; its clients send their requests again.

        Raises:
            RuntimeError: Triton has ended and cannot be started anew.
        """
        if not self._frontend.alive():
            self._restart()
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            try:
                request = self._waiting.get(timeout=left)
            except queue.Empty:
                break
            try:
                answer = self._steps.answered(self._endpoints[request.endpoint], request.tensors)
            except RequestError as error:
                request.result.set_exception(error)
                continue
            if answer is None:
                self._current = request
                return request
            request.result.set_result(answer)
        return None

    def resolve(self, request: Request, outcome: Any) -> None:
        """Answer a request that all ranks have executed; a ServiceError as outcome becomes the error.

        Raises:
            RuntimeError: the service's last update is not the one that the request asked for.
        """
        failed = isinstance(outcome, ServiceError)
        if not failed:
            self._steps.done(self._endpoints[request.endpoint], request.tensors, outcome)
        self._current = None  # before the answer, so that a client that has it never sees the server busy with it
        if failed:
            request.result.set_exception(outcome)
        else:
            request.result.set_result(outcome)
