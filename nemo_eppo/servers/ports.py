"""Free ports for servers."""

import random
import socket
import time

from nemo_eppo.config import ConfigError

FREE_PORTS = (20000, 32000)
_RETRY_S = 0.2  # seconds between attempts


def free_port(host: str, port: int, patience: float = 0.0) -> int:
    """Return `port` or, if it is 0, a free one. Binding it here gives a clear error if it is taken.

    A chosen one lies below the range for outgoing connections, so that none of them takes it before Triton does.

    Args:
        patience: seconds to wait for a given port: a Triton whose server was killed holds it for some.
    """
    deadline = time.monotonic() + patience
    while True:
        for candidate in [port] if port else random.SystemRandom().sample(range(*FREE_PORTS), 20):
            if (why := obstacle(host, candidate)) is None:
                return candidate
        if time.monotonic() >= deadline:
            raise ConfigError(f"port = {port}: cannot listen on {host}:{candidate}, {why}")
        time.sleep(_RETRY_S)


def obstacle(host: str, port: int) -> str | None:
    """Say why a server cannot listen there; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None
