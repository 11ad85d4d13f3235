"""An actor that loses a server saves its finished steps, waits until all servers answer again, and resumes."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_eppo.config import RunStopped
from nemo_eppo.megatron.collectives import PeerError, on_rank0
from nemo_eppo.rewards.functions import RewardFunctionError
from nemo_eppo.servers.client import ServerClient, ServerUnavailable
from nemo_eppo.settings.servers import ServersConfig
from nemo_eppo.training.stopping import StopWatch

_MAX_LOSSES = 3  # lost servers at one step before the run ends with the error: the step itself seems to be the cause
_LOG_INTERVAL = 30.0  # seconds between two log lines about a server that is waited for


class Remote(Protocol):
    """A critic or reward models behind a server."""

    @property
    def client(self) -> ServerClient:
        """Its client, used on rank 0 alone."""

    def connect(self) -> object:
        """Wait until the server answers, and check that it fits; collective."""


class Recovery:
    """Waits for lost servers and connects to them again; one object for the whole run. All methods are collective."""

    def __init__(self, remotes: Sequence[Remote], config: ServersConfig, logger: logging.Logger) -> None:
        self._remotes, self._patience, self._logger = remotes, config.patience, logger
        self._losses: dict[int, int] = {}

    def recover(
        self,
        error: ServerUnavailable | RewardFunctionError | PeerError,
        step: int,
        save: Callable[[], int | None],
        watch: StopWatch,
    ) -> None:
        """Return when all servers answer again, and fit; the run then resumes from its newest checkpoint.

        Args:
            error: what ended a step, on this rank.
            step: number of steps that were done before.
            save: saves these steps if that is possible, and returns the newest step that is saved; None if none is.
            watch: a run that it has told to end waits for no server.

        Raises:
            the error itself, if it is not a lost server, if nothing is saved, or if a server stays away. When a reward
            function failed, the finished steps are saved first.
            ServerError: a server came back as another one.
            RunStopped: the run was told to end; the log says which of its steps are saved.
        """
        failed = on_rank0(lambda: type(error))
        if failed is RewardFunctionError:
            save()
        if failed is not ServerUnavailable:
            raise error
        self._losses[step] = self._losses.get(step, 0) + 1
        saved, answered = save(), False
        if saved is not None and self._losses[step] <= _MAX_LOSSES and self._patience:
            self._logger.warning("%s", error)
            answered = self._wait(watch)
        if saved is not None and watch.told():
            lost = "" if saved == step else f"; {step - saved} more have to be made again"
            self._logger.info("told to end while a server is lost: the first %d steps are saved%s", saved, lost)
            raise RunStopped from error
        if not answered:
            raise error
        for remote in self._remotes:
            remote.connect()
        self._logger.warning("all servers answer again")

    def _wait(self, watch: StopWatch) -> bool:
        """Wait until all servers answer or any rank is told to end, and return whether they answer."""
        started, answered = time.monotonic(), None
        while answered is None:  # in slices: the other ranks' collectives would time out before a long patience ends
            answered = on_rank0(lambda: self._wait_some(started, watch))
            if answered is None and watch.told():
                return False
        return answered

    def _wait_some(self, started: float, watch: StopWatch) -> bool | None:
        """Wait for `_LOG_INTERVAL` at most; False when the patience is over, None when there is more to wait."""
        until = 0.0
        while lost := [remote.client for remote in self._remotes if not _answers(remote.client)]:
            now = time.monotonic()
            if now - started >= self._patience:
                return False
            if not until:
                until = now + _LOG_INTERVAL
                names = " and ".join(f"the {client.name} server at {client.config.url}" for client in lost)
                self._logger.warning("waiting for %s (%.0f of %.0f s)", names, now - started, self._patience)
            elif now >= until or watch.signalled:
                return None
            time.sleep(1.0)
        return True


def _answers(client: ServerClient) -> bool:
    try:
        client.status()
    except ServerUnavailable:
        return False
    return True
