"""What an actor does when a server is lost: it saves what it has, waits until its servers answer again, and resumes."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_eppo.config import RunStopped
from nemo_eppo.megatron.collectives import PeerError, on_rank0
from nemo_eppo.servers.client import ServerClient, ServerUnavailable
from nemo_eppo.settings.servers import ServersConfig
from nemo_eppo.training.stopping import StopWatch

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

    def recover(
        self, error: ServerUnavailable | PeerError, step: int, save: Callable[[], bool], watch: StopWatch
    ) -> None:
        """Return when all servers answer again, and fit; the run then resumes from its newest checkpoint.

        Args:
            error: what ended a step, on this rank.
            step: number of steps that were done before.
            save: saves these steps if that is possible, and returns whether there is a checkpoint now.
            watch: a run that it has told to end waits for no server.

        Raises:
            the error, if it was no lost server, if nothing is saved, or if a server stays away.
            ServerError: a server came back as another one.
            RunStopped: the run was told to end; its steps are saved.
        """
        if not on_rank0(lambda: isinstance(error, ServerUnavailable)):
            raise error
        self._losses[step] = self._losses.get(step, 0) + 1
        saved, back = save(), False
        if saved and self._losses[step] <= _MOST_LOSSES and self._patience:
            self._logger.warning("%s", error)
            back = on_rank0(lambda: self._wait(watch))
        if saved and watch.told():
            self._logger.info("told to end while a server is lost: the steps done are saved")
            raise RunStopped from error
        if not back:
            raise error
        for remote in self._remotes:
            remote.connect()
        self._logger.warning("all servers answer again")

    def _wait(self, watch: StopWatch) -> bool:
        """Wait on rank 0 until all servers answer or a signal comes, and return whether they answer."""
        started, told = time.monotonic(), 0.0
        while lost := [remote.client for remote in self._remotes if not _answers(remote.client)]:
            waited = time.monotonic() - started
            if waited >= self._patience or watch.signalled:
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
