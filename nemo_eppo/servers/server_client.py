"""The client of any server: it waits until the server is up, sends requests, retries, and notices a lost server."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch

from nemo_eppo.servers.protocol import (
    PROTOCOL_VERSION,
    STATUS,
    Arrays,
    Endpoint,
    RequestError,
    ServerEnding,
    check_arrays,
)
from nemo_eppo.servers.transport import ServerError, Transport
from nemo_eppo.settings.servers import ClientConfig

logger = logging.getLogger(__name__)

# While a request waits, the server is asked for its status after this many seconds; two failures in a row mean that it
# is lost, so a lost server is reported after at most 2 * (4 + 8) s.
HEALTH_INTERVAL_S = 4.0
HEALTH_TIMEOUT_S = 8.0
# A request whose connection broke is sent again for RETRY_S, in which a server can start its Triton anew; a request for
# an update too, because the server recognises a repeated one.
RETRY_S, RETRY_PAUSE_S = 20.0, 1.0
PARALLEL_REQUESTS = 4

ResultT = TypeVar("ResultT")


class ServerUnavailable(ServerError):
    """A server does not answer, or not any more."""


class ServerClient:
    """Sends requests to one server, or shares them among several that serve the same model.

    Args:
        name: the kind of job expected there, which messages name.
        others: addresses of further servers, which also answer for one that is lost; none for a service with steps.
    """

    endpoints: ClassVar[Mapping[str, Endpoint]] = {}
    """The endpoints that `call` may ask; subclasses set them."""

    def __init__(self, name: str, config: ClientConfig, others: Sequence[str] = ()) -> None:
        self.name, self.config = name, config
        self._transports = [Transport(url, config.certificates) for url in (config.url, *others)]
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
        for transport in self._transports:
            transport.close()

    def status(self) -> dict[str, Any]:
        """Return the status, see `Intake`, of the first server that answers.

        Raises:
            ServerUnavailable: there was no answer within HEALTH_TIMEOUT_S.
            ServerError: what answered is not such a server.
        """
        *others, last = self._transports
        for transport in others:
            with suppress(ServerUnavailable):
                return self._status(transport)
        return self._status(last)

    def _status(self, transport: Transport) -> dict[str, Any]:
        """Return the status of one server; raises as `status` does."""
        try:
            answer = transport.request("status", {}, timeout=HEALTH_TIMEOUT_S)
            STATUS.check_answer(answer, {})
        except ConnectionError as error:
            raise self._unavailable("status", error) from error
        except (ServerError, RequestError) as error:
            raise self._failed("status", error) from None
        status: dict[str, Any] = answer["status"]
        return status

    def connect(self, expect: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until all servers answer, then compare their status with `expect`, and with each other.

        Args:
            expect: status entries that must be equal (`vocab_size`, `tokenizer`, `step`, ...) or, if called `max_*`, at
                least as large. Protocol and kind of job are always compared.

        Returns:
            The first server's status.

        Raises:
            ServerUnavailable: one did not answer within `connect_timeout`.
            ServerError: a status differs; the message lists all differences.
        """
        first, *others = self._transports
        status = self._connect(first, expect)
        alike: dict[str, Any] = {key: status[key] for key in ("tokenizer", "reward") if key in status}
        for transport in others:
            self._connect(transport, {**expect, **alike, "max_batch_size": status["max_batch_size"]})
        self._max_batch_size = status["max_batch_size"]
        return status

    def _connect(self, transport: Transport, expect: Mapping[str, Any]) -> dict[str, Any]:
        start, next_log = time.monotonic(), 0.0
        while True:
            try:
                status = self._status(transport)
                break
            except ServerUnavailable as error:
                waited = time.monotonic() - start
                if waited > self.config.connect_timeout:
                    raise ServerUnavailable(f"{error} (waited {waited:.0f} s)") from None
                if waited >= next_log:
                    where, limit = f"the {self.name} server at {transport.url}", self.config.connect_timeout
                    logger.info("waiting for %s (%.0f of %.0f s)", where, waited, limit)
                    next_log = waited + 30
                _pause(transport, 0.5)
        differences = []
        for key, wanted in {"protocol": PROTOCOL_VERSION, "job": self.name, "max_batch_size": 1, **expect}.items():
            found = status.get(key)
            least = "at least " if key.startswith("max_") else ""
            fits = type(found) is type(wanted) and (found >= wanted if least and found is not None else found == wanted)
            if not fits:
                differences.append(f"{key} is {found!r}, expected {least}{wanted!r}")
        if differences:
            raise ServerError(f"the server at {transport.url} does not fit: " + "; ".join(differences))
        return status

    def call(
        self, name: str, finish: Callable[[dict[str, Any]], ResultT], **tensors: torch.Tensor
    ) -> "Future[ResultT]":
        """Call the endpoint `name`; the future gives `finish(outputs by name)`. `connect` has to come first.

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
            futures = [self._in_order.submit(self._ask, name, arrays, what, sizes, 0)]
        else:
            servers, futures = len(self._transports), []
            size = min(self._max_batch_size, -(-sizes["B"] // servers))
            for number, start in enumerate(range(0, sizes["B"], size)):
                part = {key: array[start : start + size] for key, array in arrays.items()}
                what, rows = f"{name} (rows from {start})" if start else name, min(size, sizes["B"] - start)
                futures.append(self._parallel.submit(self._ask, name, part, what, {**sizes, "B": rows}, number))

        return _joined(futures, finish)

    def _ask(self, name: str, arrays: Arrays, what: str, sizes: Mapping[str, int], number: int) -> dict[str, Any]:
        """Send one request and check the answer; runs in a thread of the pools.

        It goes to server `number` modulo their number; if that is lost, to the next one, round and round for RETRY_S.
        """
        lost, turn = None, 0
        while True:
            transport = self._transports[(number + turn) % len(self._transports)]
            try:
                watch = self._watch(what, transport)
                answer = transport.request(name, arrays, interval=HEALTH_INTERVAL_S, while_waiting=watch)
                self.endpoints[name].check_answer(answer, {**sizes, **self._sizes})
                return answer
            except ConnectionError as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > RETRY_S:
                    raise self._unavailable(what, error) from error
                turn += 1
                if turn % len(self._transports) == 0:
                    _pause(transport, RETRY_PAUSE_S)
            except ServerUnavailable:
                raise
            except ServerError as error:
                # the server ends, or was started anew and has lost its last updates
                if error.field in (ServerEnding.field, "step"):
                    raise self._unavailable(what, error) from None
                raise self._failed(what, error) from None
            except RequestError as error:
                raise self._failed(f"the answer of {what}", error) from None

    def _watch(self, what: str, transport: Transport) -> Callable[[], None]:
        """Return a function to call while a request waits; it raises if the server is lost or the time is up."""
        deadline = time.monotonic() + self.config.request_timeout
        failures = 0

        def watch() -> None:
            nonlocal failures
            try:
                self._status(transport)
                failures = 0
            except ServerUnavailable as error:
                failures += 1
                if failures == 2:
                    others = len(self._transports) > 1
                    raise ConnectionError(str(error)) if others else self._unavailable(what, error) from error
            if time.monotonic() > deadline:
                raise self._unavailable(what, TimeoutError(f"no answer within {self.config.request_timeout:.0f} s"))

        return watch

    def _unavailable(self, what: str, cause: BaseException) -> ServerUnavailable:
        return ServerUnavailable(f"{self.name} server at {self.config.url} unavailable for {what}: {cause}")

    def _failed(self, what: str, error: ServerError | RequestError) -> ServerError:
        message = f"{self.name} server at {self.config.url}, {what}: {error}"
        return ServerError(message, error.field, error.value, error.expected)


def _pause(transport: Transport, seconds: float) -> None:
    """Wait at most `seconds` for a server to be ready, and 0.1 s more: a ready one may still refuse requests."""
    transport.server_ready(timeout=seconds)
    time.sleep(0.1)


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
                try:
                    outputs, *more = [future.result() for future in futures]
                    if more:  # a single answer may hold JSON
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
