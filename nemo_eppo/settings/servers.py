"""Addresses: where a server listens, and where its clients find it."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from nemo_eppo.config import Config


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


def _address(url: str) -> str:
    host, _, port = url.removeprefix("grpc://").partition(":")
    if not (url.startswith("grpc://") and host and "/" not in host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError("expected grpc://HOST:PORT")
    return url


Address = Annotated[str, AfterValidator(_address)]
"""Address of a server, grpc://host:port."""


class ClientConfig(Config):
    """Where a server is found."""

    url: Address
    """Address of the server, grpc://host:port."""
    certificates: Path | None = None
    """Folder with the run's ca.pem, cert.pem and key.pem, as the server has it; null if the server has none."""
    connect_timeout: float = Field(default=1800.0, gt=0)
    """Seconds to wait for the server at the start, while it may load a large model."""
    request_timeout: float = Field(default=3600.0, gt=0)
    """Seconds after which a request is given up even if the server is healthy."""


class ServersConfig(Config):
    """What the actor does when a server is lost."""

    patience: float = Field(600.0, ge=0)
    """Seconds to wait for a lost server before the run ends; 0 to end at once. Finished steps are saved first."""
