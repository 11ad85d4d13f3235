"""Free ports for servers."""

import random
import socket

from nemo_eppo.config import ConfigError

FREE_PORTS = (20000, 32000)


def free_port(host: str, port: int) -> int:
    """Return `port` or, if it is 0, a free one. Binding it here gives a clear error at once if it is taken.

    A free one lies below the range for outgoing connections, one of which could take it before Triton does.
    """
    candidates = [port] if port else random.SystemRandom().sample(range(*FREE_PORTS), 20)
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, candidate))
                return candidate
            except OSError as error:
                why = error.strerror
    raise ConfigError(f"port = {port}: cannot listen on {host}:{candidate}, {why}")
