"""Rank 0's intake: requests are checked in Triton's threads, wait for the main thread, and get their answer from it."""

import hmac
import json
import logging
import os
import queue
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_eppo.servers.frontend import Frontend
from nemo_eppo.servers.protocol import (
    ENDPOINTS,
    PROTOCOL_VERSION,
    Limits,
    RequestError,
    ServiceError,
    check_arrays,
    json_array,
    validate_request,
)
from nemo_eppo.servers.service import ServerConfig, Service

logger = logging.getLogger(__name__)


@dataclass
class Request:
    """A valid request on its way through the main thread."""

    endpoint: str
    arrays: dict[str, np.ndarray]
    result: "Future[Any]" = field(default_factory=Future)

    def digest(self) -> int:
        checksum = 0
        for array in self.arrays.values():
            checksum = zlib.crc32(array.tobytes(), checksum)
        return checksum


class Intake:
    """Takes the requests for one service; `next_request` and `resolve` are for the main thread."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self._service, self._config = service, config
        self._secret = config.token.get_secret_value().encode() if config.token else b""
        self._limits = Limits(service.vocab_size, service.max_sequence_length, config.max_batch_size)
        # `status` comes last: once it answers, so do the others.
        self._frontend = Frontend([*service.endpoints, "status"], self._answer, config.host, config.port)
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._current: Request | None = None
        self._closed = threading.Event()
        self._last_update: tuple[int, int, Any] | None = None  # step, digest of its request, metrics

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
                    temporary = ready.with_name(f".{ready.name}.{os.getpid()}")
                    temporary.write_text(json.dumps(content))
                    os.replace(temporary, ready)
                logger.info("%s server listens on %s", self._service.name, url)
                yield
            finally:
                if ready:
                    ready.unlink(missing_ok=True)
                self._close()

    def _close(self) -> None:
        """Triton ends only after the requests that it has passed on, so every one of them needs an answer."""
        self._closed.set()
        if self._current and not self._current.result.done():
            self._current.result.set_exception(ServiceError(f"{self._current.endpoint} ended the server; see its log"))
        while not self._waiting.empty():
            self._waiting.get().result.set_exception(ServiceError("the server is stopping"))

    def _answer(self, endpoint: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A request's outputs, or `error`. Called in a thread of the endpoint's own."""
        try:
            token = bytes(arrays.pop("token")[0])
            if self._secret and not hmac.compare_digest(token, self._secret):
                raise RequestError("token", "(not shown)", "the server's token")
            if endpoint == "status":
                return {"status": json_array(self._status())}
            validate_request(endpoint, arrays, self._limits)
            request = Request(endpoint, arrays)
            self._waiting.put(request)
            if self._closed.is_set():  # after `put`, so that `_close` cannot miss both
                raise ServiceError("the server is stopping")
            return _encode(endpoint, request.result.result())
        except ServiceError as error:
            return {"error": json_array(error.payload())}
        except Exception:
            logger.exception("%s failed", endpoint)
            return {"error": json_array(ServiceError(f"{endpoint} failed inside the server; see its log").payload())}

    def _status(self) -> dict[str, Any]:
        current = self._current
        return {
            "protocol": PROTOCOL_VERSION,
            "job": self._service.name,
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
        """The next request that all ranks have to execute, or None after `timeout` seconds without one.

        Raises:
            RuntimeError: Triton has ended.
        """
        self._current = None
        if not self._frontend.alive():
            raise RuntimeError(f"Triton has ended:\n{self._frontend.failures()}")
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            try:
                request = self._waiting.get(timeout=left)
            except queue.Empty:
                break
            try:
                metrics = self._metrics_if_applied(request)
            except RequestError as error:
                request.result.set_exception(error)
                continue
            if metrics is None:
                self._current = request
                return request
            request.result.set_result(metrics)
        return None

    def _metrics_if_applied(self, request: Request) -> Any:
        """The stored metrics if this is the last update once more; None if the request is due.

        Raises:
            RequestError: its step is neither the next update's nor the last one's.
        """
        if "step" not in request.arrays:
            return None
        step, last = int(request.arrays["step"][0]), self._service.step
        if request.endpoint in ("critic_begin", "critic_saved"):
            return None
        if request.endpoint == "critic_save":
            if step != last:
                raise RequestError("step", step, f"{last}, the last applied update")
            return None
        if step == last + 1:
            return None
        if self._last_update and step == self._last_update[0]:
            if request.digest() != self._last_update[1]:
                raise RequestError("step", step, f"{last + 1}: update {last} was made with other data")
            return self._last_update[2]
        raise RequestError("step", step, f"{last + 1}: the last applied update is {last}")

    def resolve(self, request: Request, outcome: Any) -> None:
        """Answer a request that all ranks have executed; a ServiceError as outcome becomes the error.

        Raises:
            RuntimeError: the service did not count the update that it was asked for.
        """
        if isinstance(outcome, ServiceError):
            request.result.set_exception(outcome)
            return
        if request.endpoint == "critic_train":
            step = int(request.arrays["step"][0])
            if self._service.step != step:
                raise RuntimeError(f"the service says step {self._service.step} after update {step}")
            self._last_update = (step, request.digest(), outcome)
        elif request.endpoint == "critic_begin":
            self._last_update = None  # it may have gone back behind that update
        request.result.set_result(outcome)


def _encode(endpoint: str, result: Any) -> dict[str, np.ndarray]:
    """A service's result as the arrays that Triton wants: C-contiguous, of the declared dtype, none of them empty."""
    spec = ENDPOINTS[endpoint]
    if spec.reply:
        return {spec.reply: json_array(result)}
    arrays = {name: np.ascontiguousarray(x.detach().float().cpu().numpy()) for name, x in result.items()}
    arrays = {name: array for name, array in arrays.items() if array.size or not spec.outputs[name].optional}
    try:
        check_arrays(spec.outputs, arrays)
    except RequestError as error:
        raise TypeError(f"the service's own output does not fit: {error}") from None
    return arrays
