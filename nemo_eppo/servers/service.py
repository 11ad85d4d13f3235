"""The interface of what a server serves (`Service`), and its address and limits (`ServerConfig`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field, model_validator

from nemo_eppo.config import Config

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


class ServerConfig(Config):
    """The address on which a server listens, and the requests that it accepts."""

    host: str = "127.0.0.1"
    """Address to listen on; any but a local one (127.x.x.x) requires certificates."""
    port: int = Field(default=0, ge=0, le=65535)
    """gRPC port; 0: a free one, which the ready file names."""
    certificates: Path | None = None
    """Folder with the run's ca.pem, cert.pem and key.pem, which `nemo-eppo certificates` and `launch` make: only those
    who have them are heard, and all that is sent is encrypted. null: everybody on this machine is heard."""
    max_batch_size: int = Field(default=256, gt=0)
    """Most sequences in one request. Clients split larger requests for inference, but never those for an update, so a
    critic needs at least the actor's ppo.mini_batch_size."""
    ready_file: Path | None = None
    """File that is written when requests are accepted (JSON: url, pid, job, protocol) and removed at the end."""

    @model_validator(mode="after")
    def _certificates_unless_local(self) -> "ServerConfig":
        if not self.host.startswith("127.") and self.certificates is None:
            raise ValueError(f"host {self.host} is open to the network: expected certificates, or host 127.0.0.1")
        return self
