"""What an actor does when a server is lost: it saves what it has, waits until its servers answer again, and resumes."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_eppo.megatron.collectives import PeerError, on_rank0
from nemo_eppo.servers.client import ServerClient, ServerUnavailable
from nemo_eppo.settings.servers import ServersConfig

_MOST_LOSSES = 3  # of servers at the same step, after which the step itself is taken to end them
_TELL_S = 30.0  # seconds between two lines about a server that is waited for


class Remote(Protocol):
    """A critic or reward models behind a server."""

    @property
    def client(self) -> ServerClient:
        """Its client, of which rank 0 alone asks."""

    def connect(self) -> object:
        """Wait until the server answers, and check that it fits; collective."""


class Recovery:
    """Brings an actor and its servers together again; one object for the whole run. All methods are collective."""

    def __init__(self, remotes: Sequence[Remote], config: ServersConfig, logger: logging.Logger) -> None:
        self._remotes, self._patience, self._logger = remotes, config.patience, logger
        self._losses: dict[int, int] = {}

    def recover(self, error: ServerUnavailable | PeerError, step: int, save: Callable[[], bool]) -> None:
        """Return when all servers answer again, and fit; the run then resumes from its newest checkpoint.

        Args:
            error: what ended a step, on this rank.
            step: number of steps that were done before.
            save: saves these steps if that is possible, and returns whether there is a checkpoint now.

        Raises:
            the error, if it was no lost server, if nothing is saved, or if a server stays away.
            ServerError: a server came back as another one.
        """
        if not on_rank0(lambda: isinstance(error, ServerUnavailable)):
            raise error
        self._losses[step] = self._losses.get(step, 0) + 1
        if not save() or self._losses[step] > _MOST_LOSSES or not self._patience:
            raise error
        self._logger.warning("%s", error)
        if not on_rank0(self._wait):
            raise error
        for remote in self._remotes:
            remote.connect()
        self._logger.warning("all servers answer again")

    def _wait(self) -> bool:
        """Wait on rank 0 until all servers answer, and return whether they do."""
        started, told = time.monotonic(), 0.0
        while lost := [remote.client for remote in self._remotes if not _answers(remote.client)]:
            waited = time.monotonic() - started
            if waited >= self._patience:
                return False
            if waited >= told:
                names = " and ".join(f"the {client.name} server at {client.config.url}" for client in lost)
                self._logger.warning("waiting for %s (%.0f of %.0f s)", names, waited, self._patience)
                told = waited + _TELL_S
            time.sleep(1.0)
        return True


def _answers(client: ServerClient) -> bool:
    try:
        client.status()
    except ServerUnavailable:
        return False
    return True
