"""The client of any server: it waits until the server is up, sends requests, retries, and notices a lost server."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from pydantic import Field

from nemo_eppo.config import Config
from nemo_eppo.servers.protocol import PROTOCOL_VERSION, STATUS, Arrays, Endpoint, RequestError, check_arrays
from nemo_eppo.servers.transport import ServerError, Transport

logger = logging.getLogger(__name__)

# While a request waits, the server is asked for its status after this many seconds; two failures in a row mean that it
# is lost, so a lost server is reported after at most 2 * (4 + 8) s.
HEALTH_INTERVAL_S = 4.0
HEALTH_TIMEOUT_S = 8.0
# A request whose connection broke is sent again for so long, within which a server starts its Triton anew; one for an
# update too, because the server recognises a repeated one.
RETRY_S, RETRY_PAUSE_S = 20.0, 1.0
PARALLEL_REQUESTS = 4

ResultT = TypeVar("ResultT")


class ServerUnavailable(ServerError):
    """A server does not answer, or no longer."""


class ClientConfig(Config):
    """Where a server is found."""

    url: str = Field(pattern=r"^grpc://[^/:]+:\d+$")
    """Address of the server, grpc://host:port."""
    certificates: Path | None = None
    """Folder with the run's ca.pem, cert.pem and key.pem, as the server has it; null if the server has none."""
    connect_timeout: float = Field(default=1800.0, gt=0)
    """Seconds to wait for the server at the start, while it may load a large model."""
    request_timeout: float = Field(default=3600.0, gt=0)
    """Seconds after which a request is given up even if the server is healthy."""


class ServerClient:
    """Sends requests to one server. `name` is the kind of job expected there; every message has it."""

    endpoints: ClassVar[Mapping[str, Endpoint]] = {}
    """The endpoints that `call` may ask; subclasses set them."""

    def __init__(self, name: str, config: ClientConfig) -> None:
        self.name, self.config = name, config
        self._transport = Transport(config.url, config.certificates)
        self._parallel = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix=f"{name}-client")
        # Requests that carry a step leave one by one, in the order of the calls.
        self._in_order = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-client-steps")
        self._max_batch_size = 0
        self._sizes: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop requests that are not sent yet, and wait for the others."""
        self._parallel.shutdown(cancel_futures=True)
        self._in_order.shutdown(cancel_futures=True)
        self._transport.close()

    def status(self) -> dict[str, Any]:
        """Return the server's status, see `Intake`.

        Raises:
            ServerUnavailable: there was no answer within HEALTH_TIMEOUT_S.
            ServerError: what answered is not such a server.
        """
        try:
            answer = self._transport.request("status", {}, timeout=HEALTH_TIMEOUT_S)
            STATUS.check_answer(answer, {})
        except ConnectionError as error:
            raise self._unavailable("status", error) from error
        except (ServerError, RequestError) as error:
            raise self._failed("status", error) from None
        status: dict[str, Any] = answer["status"]
        return status

    def connect(self, expect: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the server answers, then compare its status with `expect`.

        Args:
            expect: status entries that must be equal (`vocab_size`, `tokenizer`, `step`, ...) or, if called `max_*`, at
                least as large. Protocol and kind of job are always compared.

        Returns:
            The server's status.

        Raises:
            ServerUnavailable: it did not answer within `connect_timeout`.
            ServerError: its status differs; the message lists all differences.
        """
        start, told = time.monotonic(), 0.0
        while True:
            try:
                status = self.status()
                break
            except ServerUnavailable as error:
                waited = time.monotonic() - start
                if waited > self.config.connect_timeout:
                    raise ServerUnavailable(f"{error} (waited {waited:.0f} s)") from None
                if waited >= told:
                    logger.info("waiting for the %s server at %s (%.0f s)", self.name, self.config.url, waited)
                    told = waited + 30
                time.sleep(0.5)
        differences = []
        for key, wanted in {"protocol": PROTOCOL_VERSION, "job": self.name, "max_batch_size": 1, **expect}.items():
            found = status.get(key)
            least = "at least " if key.startswith("max_") else ""
            fits = type(found) is type(wanted) and (found >= wanted if least and found is not None else found == wanted)
            if not fits:
                differences.append(f"{key} is {found!r}, expected {least}{wanted!r}")
        if differences:
            raise ServerError(f"the server at {self.config.url} does not fit: " + "; ".join(differences))
        self._max_batch_size = status["max_batch_size"]
        return status

    def call(
        self, name: str, finish: Callable[[dict[str, Any]], ResultT], **tensors: torch.Tensor
    ) -> "Future[ResultT]":
        """Ask the endpoint `name`; the future gives `finish(outputs by name)`. `connect` has to come first.

        Requests without a step are split into the server's largest batches, sent in parallel, and put together again.

        Raises:
            RequestError: at once, if names, kinds or shapes of `tensors` are wrong.
            ServerError: from the future; ServerUnavailable if the server is lost.
        """
        if not self._max_batch_size:
            raise RuntimeError(f"{self.name} client: `connect` comes before `{name}`")
        endpoint = self.endpoints[name]
        arrays = endpoint.encode(tensors)
        sizes = check_arrays(endpoint.inputs, arrays)
        if endpoint.step:
            what = f"{name} (step {arrays['step'][0]})"
            futures = [self._in_order.submit(self._ask, name, arrays, what, sizes)]
        else:
            size, futures = self._max_batch_size, []
            for start in range(0, sizes["B"], size):
                part = {key: array[start : start + size] for key, array in arrays.items()}
                what, rows = f"{name} (rows from {start})" if start else name, min(size, sizes["B"] - start)
                futures.append(self._parallel.submit(self._ask, name, part, what, {**sizes, "B": rows}))

        return _joined(futures, finish)

    def _ask(self, name: str, arrays: Arrays, what: str, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Send one request, again if the connection breaks, and check the answer; runs in a thread of the pools."""
        lost = None
        while True:
            try:
                watch = self._watch(what)
                answer = self._transport.request(name, arrays, interval=HEALTH_INTERVAL_S, while_waiting=watch)
                self.endpoints[name].check_answer(answer, {**sizes, **self._sizes})
                return answer
            except ConnectionError as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > RETRY_S:
                    raise self._unavailable(what, error) from error
                time.sleep(RETRY_PAUSE_S)
            except ServerUnavailable:
                raise
            except ServerError as error:
                if error.field == "step":  # it has been started anew, and its last updates are lost
                    raise self._unavailable(what, error) from None
                raise self._failed(what, error) from None
            except RequestError as error:
                raise self._failed(f"the answer of {what}", error) from None

    def _watch(self, what: str) -> Callable[[], None]:
        """Return a function to call while a request waits; it raises if the server is lost or the time is up."""
        deadline = time.monotonic() + self.config.request_timeout
        failures = 0

        def watch() -> None:
            nonlocal failures
            try:
                self.status()
                failures = 0
            except ServerUnavailable as error:
                failures += 1
                if failures == 2:
                    raise self._unavailable(what, error) from error
            if time.monotonic() > deadline:
                raise self._unavailable(what, TimeoutError(f"no answer within {self.config.request_timeout:.0f} s"))

        return watch

    def _unavailable(self, what: str, cause: BaseException) -> ServerUnavailable:
        return ServerUnavailable(f"{self.name} server at {self.config.url} unavailable for {what}: {cause}")

    def _failed(self, what: str, error: ServerError | RequestError) -> ServerError:
        message = f"{self.name} server at {self.config.url}, {what}: {error}"
        return ServerError(message, error.field, error.value, error.expected)


def _joined(
    futures: Sequence["Future[dict[str, Any]]"], finish: Callable[[dict[str, Any]], ResultT]
) -> "Future[ResultT]":
    """Return a future of `finish(joined outputs of all futures)`; the first failure ends it and cancels the others."""
    joined: Future[ResultT] = Future()
    lock, left = threading.Lock(), len(futures)

    def done(future: "Future[dict[str, Any]]") -> None:
        nonlocal left
        error = None if future.cancelled() else future.exception()
        with lock:
            left -= 1
            if joined.done():
                return
            if error is not None:
                joined.set_exception(error)
            elif not left:
                outputs, *more = [future.result() for future in futures]
                try:
                    if more:  # else there may be JSON in it
                        outputs = {k: np.concatenate([part[k] for part in (outputs, *more)]) for k in outputs}
                    joined.set_result(finish(outputs))
                except BaseException as failure:
                    joined.set_exception(failure)
        if error is not None:
            for other in futures:
                other.cancel()

    for future in futures:
        future.add_done_callback(done)
    return joined
