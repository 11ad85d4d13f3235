"""What a PPO step calls on a critic, wherever it runs, and the client of a critic job."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import CriticClient
from nemo_eppo.settings.servers import ClientConfig

ValueT = TypeVar("ValueT")


class Critic(Protocol):
    """Gives values of a rollout and is updated on it. All methods are collective over the actor's ranks, and so are the
    functions that they return, which wait for or compute the answer and are called in the order they were returned."""

    updates: int
    """Number of updates that the critic has been asked to make so far."""

    def values(self, batch: RolloutBatch, *, after_last: bool = False) -> Callable[[], Tensor]:
        """Start to compute values [B, T] of the states in which the actions were taken; [B, T + 1] with `after_last`,
        which adds the value after the last token."""

    def train(self, batch: RolloutBatch, returns: Tensor, values: Tensor) -> Callable[[], dict[str, float]]:
        """Start the next update on a mini-batch; the returned function gives its metrics."""

    def turn(self) -> AbstractContextManager[None]:
        """Keep a colocated critic on the device during a `with` block, instead of moving it there for every call."""

    def begin(self, run: int, updates: int, fresh: bool) -> None:
        """Load the state after `updates` updates of the run with the id `run`; 0 is the state at its start. With
        `fresh`, a critic of another run sets that run's checkpoints aside."""

    def save(self, keep: Sequence[int]) -> tuple[str, Callable[[], object]]:
        """Start to save the critic, and delete its checkpoints except those of the updates `keep`.

        Returns:
            where the checkpoint will be, and a function, for rank 0 alone and from any thread, that waits until it is
            complete.
        """

    def close(self) -> None:
        """Release what the critic holds on this rank."""


class RemoteCritic:
    """A critic job behind its server: rank 0 sends the requests, every rank gets the answers.

    Args:
        expect: status entries that the server must agree with (tokenizer digest, sequence limit).
        mini_batch_size: responses per update, which the server has to take in one request.

    Raises:
        ServerError: the server is not reachable or does not fit; raised on every rank, and names the server.
    """

    def __init__(self, config: ClientConfig, expect: Mapping[str, Any], mini_batch_size: int) -> None:
        self.client = CriticClient(config)
        self._expect = {**expect, "max_batch_size": mini_batch_size}
        self.updates = 0
        self.connect()

    def connect(self) -> None:
        """Wait until the server answers, and check that it fits; collective."""
        self.updates = int(on_rank0(lambda: self.client.connect(self._expect))["step"])

    def values(self, batch: RolloutBatch, *, after_last: bool = False) -> Callable[[], Tensor]:
        padded = batch.with_padding(batch.sequence_length + 1) if after_last else batch
        return request_from_rank0(lambda: self.client.infer(padded.tokens, padded.lengths))

    def train(self, batch: RolloutBatch, returns: Tensor, values: Tensor) -> Callable[[], dict[str, float]]:
        self.updates += 1
        step = self.updates
        train = self.client.train
        return request_from_rank0(lambda: train(batch.tokens, batch.lengths, returns, values, batch.mask, step))

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def begin(self, run: int, updates: int, fresh: bool) -> None:
        """See `Critic`. Raises ServerError if the critic belongs to another run or has no checkpoint of `updates`."""
        self.updates = on_rank0(lambda: self.client.begin(run, updates, fresh).result())

    def save(self, keep: Sequence[int]) -> tuple[str, Callable[[], object]]:
        step = self.updates
        path = on_rank0(lambda: self.client.save(step, keep).result())
        return path, lambda: self.client.saved(step).result()

    def close(self) -> None:
        self.client.close()


def request_from_rank0(send: "Callable[[], Future[ValueT]]") -> Callable[[], ValueT]:
    """Send a request from rank 0 now; the returned function gives the answer to every rank."""
    future = send() if dist.get_rank() == 0 else None

    def wait() -> ValueT:
        assert future is not None
        return future.result()

    return lambda: on_rank0(wait)
