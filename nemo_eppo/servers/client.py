"""Clients of the critic and reward servers. Every call returns a future, so requests overlap with other work."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, SecretStr

from nemo_eppo.config import Config
from nemo_eppo.servers.protocol import ENDPOINTS, PROTOCOL_VERSION, Arrays, RequestError, check_arrays
from nemo_eppo.servers.transport import ServerError, Transport

logger = logging.getLogger(__name__)

# While a request waits, the server is asked for its status this often; two failures in a row mean that it is gone.
# So a lost server is reported after at most 2 * (4 + 8) s.
HEALTH_INTERVAL_S = 4.0
HEALTH_TIMEOUT_S = 8.0
# A broken connection is tried again after these pauses. Safe for updates too: the server knows a repeated one.
RETRY_PAUSES_S = (0.5, 2.0)
NETWORK_TIMEOUT_S = 20.0
PARALLEL_REQUESTS = 4

A = TypeVar("A")
B = TypeVar("B")


class ServerUnavailable(ServerError):
    """A server does not answer (any more)."""


class ClientConfig(Config):
    """Where a server is found."""

    url: str = Field(pattern=r"^http://[^/:]+:\d+$")
    """Its address, http://host:port."""
    token: SecretStr | None = None
    """The server's shared secret."""
    connect_timeout: float = Field(default=1800.0, gt=0)
    """Seconds to wait for the server at the start: it may have a large model to load."""
    request_timeout: float = Field(default=3600.0, gt=0)
    """Seconds after which a request is given up although the server is well."""


class ServerClient:
    """Requests to one server. `name` is the kind of job expected there and stands in every message."""

    def __init__(self, name: str, config: ClientConfig) -> None:
        token = config.token.get_secret_value() if config.token else ""
        self.name, self.config = name, config
        self._transport = Transport(config.url, token, NETWORK_TIMEOUT_S)
        self._health = Transport(config.url, token, HEALTH_TIMEOUT_S)
        self._parallel = ThreadPoolExecutor(PARALLEL_REQUESTS, thread_name_prefix=f"{name}-client")
        # Requests that carry a step leave one by one, in the order of the calls.
        self._in_order = ThreadPoolExecutor(1, thread_name_prefix=f"{name}-client-steps")
        self._max_batch_size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop requests that have not left yet, and wait for the others."""
        self._parallel.shutdown(cancel_futures=True)
        self._in_order.shutdown(cancel_futures=True)

    def status(self) -> dict[str, Any]:
        """The server's status, see `Intake`. Raises ServerUnavailable after HEALTH_TIMEOUT_S, ServerError."""

        def give_up() -> None:
            raise TimeoutError(f"no answer within {HEALTH_TIMEOUT_S:.0f} s")

        try:
            reply = self._health.request("status", {}, interval=HEALTH_TIMEOUT_S, while_waiting=give_up)
        except ConnectionError as error:
            raise self._unavailable("status", error) from error
        except ServerError as error:
            raise self._failed("status", error) from None
        status: dict[str, Any] = reply["status"]
        return status

    def connect(self, expect: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the server answers, then compare its status with `expect`.

        Args:
            expect: status entries that must be equal (`vocab_size`, `tokenizer`, `step`, ...), except those called
                `max_*`, which must be at least this. Protocol and kind of job are always compared.

        Returns:
            The server's status.

        Raises:
            ServerUnavailable: it did not answer within `connect_timeout`.
            ServerError: it refused the token, or its status differs; the message lists all differences.
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
        for key, wanted in {"protocol": PROTOCOL_VERSION, "job": self.name, **expect}.items():
            found = status.get(key)
            least = "at least " if key.startswith("max_") else ""
            if found is None or (found < wanted if least else found != wanted):
                differences.append(f"{key} is {found!r}, expected {least}{wanted!r}")
        if differences:
            raise ServerError(f"the server at {self.config.url} does not fit: " + "; ".join(differences))
        self._max_batch_size = status["max_batch_size"]
        return status

    def call(self, endpoint: str, arrays: Arrays) -> "Future[dict[str, Any]]":
        """Ask `endpoint`; the future gives its outputs by name. Needs `connect` first.

        Requests without a step are split into the server's largest batches, sent in parallel, and put together again.

        Raises:
            RequestError: at once, if names, dtypes or shapes of `arrays` are wrong.
            ServerError: from the future; ServerUnavailable if the server is lost.
        """
        if not self._max_batch_size:
            raise RuntimeError(f"{self.name} client: `connect` comes before `{endpoint}`")
        sizes = check_arrays(ENDPOINTS[endpoint].inputs, arrays)
        if "step" in arrays:
            return self._in_order.submit(self._ask, endpoint, arrays, f"{endpoint} (step {arrays['step'][0]})")
        size, futures = self._max_batch_size, []
        for start in range(0, sizes["B"], size):
            chunk = {name: array[start : start + size] for name, array in arrays.items()}
            what = f"{endpoint} (rows from {start})" if start else endpoint
            futures.append(self._parallel.submit(self._ask, endpoint, chunk, what))

        def join(outputs: list[dict[str, Any]]) -> dict[str, Any]:
            if len(outputs) == 1:
                return outputs[0]
            return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

        return _then(futures, join)

    def _ask(self, endpoint: str, arrays: Arrays, what: str) -> dict[str, Any]:
        """One request, tried again when the connection breaks; in a thread of the pools."""
        for pause in (*RETRY_PAUSES_S, None):
            try:
                watch = self._watch(what)
                return self._transport.request(endpoint, arrays, interval=HEALTH_INTERVAL_S, while_waiting=watch)
            except ConnectionError as error:
                if pause is None:
                    raise self._unavailable(what, error) from error
                time.sleep(pause)
            except ServerUnavailable:
                raise
            except ServerError as error:
                raise self._failed(what, error) from None
        raise AssertionError("not reached")

    def _watch(self, what: str) -> Callable[[], None]:
        """A function to call while a request waits: it raises when the server is gone or the time is up."""
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

    def _refuse_non_finite(self, name: str, values: torch.Tensor, where: torch.Tensor | bool = True) -> None:
        if values.sum().isfinite():  # the usual case, in one pass
            return
        rows = (~values.isfinite() & where).any(1).nonzero().flatten().tolist()
        if rows:
            message = f"{self.name} server at {self.config.url} gave a non-finite number in row {rows[0]} of {name}"
            raise ServerError(message, f"{name}[{rows[0]}]", "nan or inf", "finite numbers")

    def _unavailable(self, what: str, cause: BaseException) -> ServerUnavailable:
        return ServerUnavailable(f"{self.name} server at {self.config.url} unavailable for {what}: {cause}")

    def _failed(self, what: str, error: ServerError) -> ServerError:
        message = f"{self.name} server at {self.config.url}, {what}: {error}"
        return ServerError(message, error.field, error.value, error.expected)


class CriticClient(ServerClient):
    """The critic server. Shapes: tokens int [B, S], lengths int [B], all others [B, T = S-1]."""

    def __init__(self, config: ClientConfig) -> None:
        super().__init__("critic", config)

    def infer(self, tokens: torch.Tensor, lengths: torch.Tensor) -> "Future[torch.Tensor]":
        """Values, fp32 [B, T]. Await pending updates first: they are not waited for here."""
        future = self.call("critic_infer", _arrays("critic_infer", tokens=tokens, lengths=lengths))

        def check(outputs: list[dict[str, Any]]) -> torch.Tensor:
            values = torch.from_numpy(outputs[0]["values"])
            real = torch.arange(values.shape[1]) < lengths.cpu()[:, None]  # the last token's value may be asked for too
            self._refuse_non_finite("values", values, real)
            return values

        return _then([future], check)

    def train(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        returns: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        step: int,
    ) -> "Future[dict[str, float]]":
        """Make update number `step` (from 1) of the critic with this mini-batch. Gives the update's metrics.

        Args:
            values: the values at the time of the rollout, for clipping.
            mask: bool, True where action t is a response token.
        """
        arrays = _arrays(
            "critic_train",
            tokens=tokens,
            lengths=lengths,
            returns=returns,
            values=values,
            mask=mask,
            step=torch.tensor([step]),
        )
        return _then([self.call("critic_train", arrays)], lambda outputs: outputs[0]["metrics"])

    def begin(self, run: int, step: int) -> "Future[int]":
        """Have the critic stand at update `step` of the run with the id `run`: it goes back if it is further."""
        arrays = _arrays("critic_begin", step=torch.tensor([step]), run=torch.tensor([run]))
        return _then([self.call("critic_begin", arrays)], lambda outputs: outputs[0]["step"])

    def save(self, step: int, keep: Sequence[int]) -> "Future[str]":
        """Start saving the critic, which must stand at update `step`. Gives the path that it will have on the server.

        Args:
            keep: updates whose checkpoints are still needed; others are removed.
        """
        arrays = _arrays("critic_save", step=torch.tensor([step]), keep=torch.tensor([0, *keep]))
        return _then([self.call("critic_save", arrays)], _path)

    def saved(self, step: int) -> "Future[str]":
        """Done when the checkpoint that `save` started is complete."""
        return _then([self.call("critic_saved", _arrays("critic_saved", step=torch.tensor([step])))], _path)


class Rewards(NamedTuple):
    """What reward models say about B responses."""

    rewards: torch.Tensor
    """fp32 [B, K], one column per reward model."""
    latents: torch.Tensor
    """fp32 [B, D], the last token's latents; D = 0 where the model has none."""


class RewardClient(ServerClient):
    """A reward server, or the reward models of a critic server (`name="critic"`)."""

    def __init__(self, config: ClientConfig, name: str = "reward") -> None:
        super().__init__(name, config)

    def infer(self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> "Future[Rewards]":
        """Rewards of the responses; tokens int [B, S], prompt_lengths and lengths (prompt and response) int [B]."""
        arrays = _arrays("reward_infer", tokens=tokens, prompt_lengths=prompt_lengths, lengths=lengths)

        def check(outputs: list[dict[str, Any]]) -> Rewards:
            rewards = torch.from_numpy(outputs[0]["rewards"])
            latents = torch.from_numpy(outputs[0].get("latents", np.zeros((len(rewards), 0), np.float32)))
            self._refuse_non_finite("rewards", rewards)
            self._refuse_non_finite("latents", latents)
            return Rewards(rewards, latents)

        return _then([self.call("reward_infer", arrays)], check)


def _arrays(endpoint: str, **tensors: torch.Tensor) -> dict[str, np.ndarray]:
    """Tensors as the arrays of the protocol. Raises RequestError for one that is not of the kind int, float or bool."""
    arrays = {}
    for name, tensor in tensors.items():
        dtype = ENDPOINTS[endpoint].inputs[name].dtype
        kind = "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "int"
        wanted = {np.float32: "float", np.uint8: "bool"}.get(dtype, "int")
        if kind != wanted:
            raise RequestError(name, tensor.dtype, wanted)
        if dtype == np.int32:  # what it cannot hold must stay wrong, for the server to refuse it
            tensor = tensor.clamp(-1, 2**31 - 1)
        if kind == "float":  # numpy knows no bfloat16
            tensor = tensor.detach().float()
        arrays[name] = np.ascontiguousarray(tensor.cpu().numpy(), dtype)
    return arrays


def _path(outputs: list[dict[str, Any]]) -> str:
    path: str = outputs[0]["path"]
    return path


def _then(futures: Sequence["Future[A]"], finish: Callable[[list[A]], B]) -> "Future[B]":
    """A future of `finish(results)` once all `futures` are done; the first failure ends it, and the others."""
    combined: Future[B] = Future()
    lock, left = threading.Lock(), len(futures)

    def done(future: "Future[A]") -> None:
        nonlocal left
        error = None if future.cancelled() else future.exception()
        with lock:
            left -= 1
            if combined.done():
                return
            if error is not None:
                combined.set_exception(error)
            elif not left:
                try:
                    combined.set_result(finish([future.result() for future in futures]))
                except BaseException as failure:
                    combined.set_exception(failure)
        if error is not None:
            for other in futures:
                other.cancel()

    for future in futures:
        future.add_done_callback(done)
    return combined
