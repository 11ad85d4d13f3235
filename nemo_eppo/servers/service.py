"""`Service`, the interface between a server and the model that it serves."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]


class Service(Protocol):
    """A model on many ranks. Every endpoint function is called on all of them, with the same arguments.

    An endpoint function takes the request as CPU tensors, of the dtypes that its `Endpoint` declares, and returns its
    outputs as tensors, or a JSON value (not null) if the endpoint has a `reply`. It may be called without a server too.
    For a request that it cannot fulfil, such as one with a non-finite loss, it raises `ServiceError` on all ranks alike
    and leaves its state unchanged. Any other exception ends the job.
    """

    name: str
    """The kind of job, which clients compare with the one they expect."""
    vocab_size: int
    """Token ids in requests are below this."""
    max_sequence_length: int
    """Most tokens that a sequence in a request may have."""

    @property
    def endpoints(self) -> Mapping[str, Callable[[Tensors], Any]]:
        """The function of every endpoint, by its name."""

    @property
    def step(self) -> int:
        """Number of updates applied so far, those before a resume included."""

    def status(self) -> dict[str, Any]:
        """Further entries of the status reply, such as the tokenizer's digest.

        It is called on rank 0 alone, from another thread and while requests execute: no collectives.
        """
