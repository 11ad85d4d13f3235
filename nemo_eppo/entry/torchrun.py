"""Ranks end with their torchrun; and a torchrun for the ranks of one machine, whose store no other machine reaches.

`python -m nemo_eppo.entry.torchrun` takes torchrun's arguments. By the store of a torchrun the ranks find each other;
that of torch's own listens on all interfaces, and whoever reaches it can change what it holds.
"""

import datetime
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING

from nemo_eppo.config import NOT_FINISHED, RunStopped
from nemo_eppo.processes import end_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup

HOST = "127.0.0.1"
"""The only address at which anything of a job on one machine listens."""
_BACKEND = "loopback"
_PATIENCE_S = 600  # as in torchrun's own static rendezvous
_PROBE_S = 30.0  # seconds in which torchrun's store has to take a connection


def end_with_torchrun() -> None:
    """Let the kernel kill this rank as soon as its torchrun is gone, even if that was killed; without one do nothing.

    A signal that can be handled would not do: a rank that saves waits for others, which may be gone already. A script
    between torchrun and its rank has to `exec` the rank.

    Raises:
        SystemExit: torchrun was gone before.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent(signal.SIGKILL)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun of the first machine holds the store
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, _PROBE_S).close()
        except OSError as error:
            sys.exit(f"torchrun has ended: its store at {address[0]}:{address[1]} does not answer ({error})")


def main() -> None:
    """Run torchrun with a store at a free port of the loopback interface."""
    from torch.distributed.run import main as torchrun

    _meet_signals_when_ranks_have_started()
    with _status_of_unfinished():
        torchrun([*_loopback_rendezvous(), *sys.argv[1:]])


def run_forked(ranks: int, function: Callable[[], None]) -> None:
    """Run a function on ranks that are forked from this process, which has to be free of threads, as `main` runs a
    script on ranks that import everything anew."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    @wraps(function)
    def rank() -> None:
        try:
            function()
        except SystemExit as end:
            if end.code == 0 and isinstance(end.__context__, RunStopped):
                os._exit(0)  # it would wait until torchrun reads what it returns, which one told to end does not do
            raise
        except Exception:
            traceback.print_exc()  # torchrun tells it only at the end of a report of its own
            raise

    arguments = [*_loopback_rendezvous(), "--nproc-per-node", str(ranks), "--start-method", "fork", function.__name__]
    _meet_signals_when_ranks_have_started()
    with _status_of_unfinished():
        elastic_launch(config_from_args(parse_args(arguments))[0], rank)()


def _meet_signals_when_ranks_have_started() -> None:
    """Make torchrun meet a signal that comes while it starts ranks as soon as they have started.

    Its handler raises an exception, which would be lost then, or would leave ranks behind of which it does not know.
    """
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    meet, start = api._terminate_process_handler, SimpleElasticAgent._initialize_workers
    this, early, starting = os.getpid(), list[int](), False

    def handle(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != this:  # a forked rank has this handler until it sets its own
            # an exception would be lost in what Python calls right after a fork
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif starting:
            early.append(signum)
        else:
            meet(signum, frame)

    def undisturbed(agent: SimpleElasticAgent, group: "WorkerGroup") -> None:
        nonlocal starting
        starting = True
        try:
            start(agent, group)
        finally:
            starting = False
        for number in early:
            meet(number, None)

    api._terminate_process_handler = handle
    SimpleElasticAgent._initialize_workers = undisturbed  # type: ignore[method-assign]


@contextmanager
def _status_of_unfinished() -> Iterator[None]:
    """End with the exit status of ranks that were told to end before their last step; or, if torchrun was told it,
    without a stack."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        yield
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        if error.get_first_failure()[1].exitcode != NOT_FINISHED:
            raise
        sys.exit(NOT_FINISHED)


def _loopback_rendezvous() -> list[str]:
    """Return torchrun's arguments for a store of this machine alone."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    class OneMachine(StaticTCPRendezvous):
        """Meets nobody else, and gives its ranks a store."""

        def __init__(self, parameters: RendezvousParameters) -> None:
            if parameters.max_nodes != 1:
                sys.exit(f"--nnodes = {parameters.max_nodes}: expected ranks of one machine; for several use torchrun")
            listener = socket.create_server((HOST, 0), backlog=1024)
            super().__init__(HOST, listener.getsockname()[1], 0, 1, parameters.run_id, _PATIENCE_S)
            patience = datetime.timedelta(seconds=_PATIENCE_S)
            store = TCPStore(HOST, self.master_port, 1, True, patience, master_listen_fd=listener.detach())
            self._found = RendezvousInfo(
                PrefixStore(self.run_id, store), 0, 1, RendezvousStoreInfo(HOST, self.master_port)
            )

        def get_backend(self) -> str:
            return _BACKEND

        def next_rendezvous(self) -> RendezvousInfo:
            return self._found

    rendezvous_handler_registry.register(_BACKEND, OneMachine)
    return [f"--rdzv-backend={_BACKEND}", f"--rdzv-endpoint={HOST}"]


if __name__ == "__main__":
    main()
