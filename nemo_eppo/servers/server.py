"""Serves a model that is spread over many ranks: rank 0 takes requests, and all ranks execute them together.

    serve(CriticService(...), ENDPOINTS, config.server, group=gloo_group)    # on every rank; returns when told to stop

Rank 0 validates a request before any other rank knows of it, so an invalid one changes nothing. A valid one is
broadcast and executed by all. One all-reduce then tells every rank whether it failed everywhere (an answer to the
client) or only somewhere (the end of the job, for the ranks no longer agree), and whether any rank was asked to stop.
"""

import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nemo_eppo.config import ConfigError
from nemo_eppo.servers.certificates import Certificates
from nemo_eppo.servers.intake import Intake, Request
from nemo_eppo.servers.protocol import Endpoint, ServiceError
from nemo_eppo.servers.service import Service, Tensors
from nemo_eppo.settings.servers import ServerConfig

# Seconds between heartbeats of an idle server, so that no collective times out and a signal to any rank is noticed.
HEARTBEAT_S = 1.0


def serve(
    service: Service, endpoints: Mapping[str, Endpoint], config: ServerConfig, *, group: dist.ProcessGroup
) -> None:
    """Serve until SIGTERM or SIGINT reaches any rank. To be called on every rank, in the main thread.

    Args:
        endpoints: the specification of the service's endpoints, by name; others in it are ignored.
        group: all ranks of the job, on a backend for CPU tensors (gloo).

    Raises:
        ConfigError: rank 0 cannot listen on the address; the other ranks fail when it has ended.
        RuntimeError: the ranks no longer agree, a rank was lost, or Triton ended.
    """
    with _stop_signals() as stop:
        if dist.get_rank(group) == 0:
            intake = Intake(service, endpoints, config)
            with intake.open():
                _run(service, group, stop, intake)
        else:
            _run(service, group, stop, None)


def check_server(config: ServerConfig) -> None:
    """Check, before any model is built, that rank 0 can serve here; whether the port is free is checked by `serve`.

    Raises:
        ConfigError: the host is no address of this machine, or the certificates do not work.
        OSError: the ready file's directory cannot be made.
    """
    try:
        socket.create_server((config.host, 0)).close()
    except OSError as error:
        reason = error.strerror
        raise ConfigError(f"server.host = {config.host!r}: expected an address of this machine ({reason})") from None
    if config.certificates is not None:
        Certificates.of(config.certificates)
    if config.ready_file is not None:
        config.ready_file.parent.mkdir(parents=True, exist_ok=True)


@dataclass
class _Stop:
    """Whether this rank was asked to stop. A plain flag, for a signal may arrive while another one is handled, and an
    Event's lock would then wait for itself."""

    asked: bool = False


def _run(service: Service, group: dist.ProcessGroup, stop: _Stop, intake: Intake | None) -> None:
    """Execute the requests of rank 0's intake until any rank is asked to stop."""
    while True:
        request = intake.next_request(HEARTBEAT_S) if intake else None
        endpoint, tensors = _share(request, group)
        outcome: Any = None
        if endpoint:
            try:
                outcome = service.endpoints[endpoint](tensors)
            except ServiceError as error:
                outcome = error
        stopping = _agree(outcome, stop, group)
        if intake and request:
            intake.resolve(request, outcome)
        if stopping:
            return


def _share(request: Request | None, group: dist.ProcessGroup) -> tuple[str, Tensors]:
    """Broadcast rank 0's request: return its endpoint, "" for a heartbeat, and its tensors on every rank."""
    source = dist.get_global_rank(group, 0)
    shared: list[Any] = ["", {}]
    if request:
        shared = [request.endpoint, {name: (tuple(x.shape), x.dtype) for name, x in request.tensors.items()}]
    dist.broadcast_object_list(shared, source, group)
    endpoint, announced = shared
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in announced.items()}
    if request:
        tensors = request.tensors
    for tensor in tensors.values():
        dist.broadcast(tensor, source, group)
    return endpoint, tensors


def _agree(outcome: Any, stop: _Stop, group: dist.ProcessGroup) -> bool:
    """Return whether any rank was asked to stop.

    Raises:
        RuntimeError: the request failed on some ranks only.
    """
    failed_here = isinstance(outcome, ServiceError)
    counts = torch.tensor([failed_here, stop.asked], dtype=torch.int64)
    dist.all_reduce(counts, group=group)
    failed, stopping = counts.tolist()
    if failed not in (0, dist.get_world_size(group)):
        here = f"here with: {outcome}" if failed_here else "but not here"
        raise RuntimeError(f"a request failed on {failed} of {dist.get_world_size(group)} ranks, {here}")
    return bool(stopping)


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Let SIGTERM and SIGINT set a flag instead of ending the process."""
    stop = _Stop()

    def ask(*_: object) -> None:
        stop.asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
