"""What an actor does when a server is lost: it saves what it has, waits until its servers answer again, and resumes."""

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
            the error, if it was no lost server, if nothing is saved, or if a server stays away. When a reward function
            failed, the steps done are saved before.
            ServerError: a server came back as another one.
            RunStopped: the run was told to end; the log says which of its steps are saved.
        """
        failed = on_rank0(lambda: type(error))
        if failed is RewardFunctionError:
            save()
        if failed is not ServerUnavailable:
            raise error
        self._losses[step] = self._losses.get(step, 0) + 1
        saved, back = save(), False
        if saved is not None and self._losses[step] <= _MOST_LOSSES and self._patience:
            self._logger.warning("%s", error)
            back = self._wait(watch)
        if saved is not None and watch.told():
            lost = "" if saved == step else f"; {step - saved} more have to be made again"
            self._logger.info("told to end while a server is lost: the first %d steps are saved%s", saved, lost)
            raise RunStopped from error
        if not back:
            raise error
        for remote in self._remotes:
            remote.connect()
        self._logger.warning("all servers answer again")

    def _wait(self, watch: StopWatch) -> bool:
        """Wait until all servers answer or any rank is told to end, and return whether they answer."""
        started, back = time.monotonic(), None
        while back is None:  # ranks would not wait for rank 0 as long as the patience may be
            back = on_rank0(lambda: self._wait_some(started, watch))
            if back is None and watch.told():
                return False
        return back

    def _wait_some(self, started: float, watch: StopWatch) -> bool | None:
        """Wait for `_TELL_S` at most; False when the patience is over, None when there is more to wait."""
        until = 0.0
        while lost := [remote.client for remote in self._remotes if not _answers(remote.client)]:
            now = time.monotonic()
            if now - started >= self._patience:
                return False
            if not until:
                until = now + _TELL_S
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
