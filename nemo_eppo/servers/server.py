"""Serve a model that lives on many ranks: rank 0 takes requests, all ranks execute them in lock step.

    serve(CriticService(...), config.server, group=gloo_group)    # on every rank; returns when told to stop

Rank 0 validates a request before any other rank hears of it, so a bad one leaves all ranks where they were. A valid one
is broadcast and executed by all. One all-reduce then tells every rank whether it failed everywhere (an answer to the
client) or only somewhere (the end of the job, for the ranks no longer agree), and whether any rank was asked to stop.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nemo_eppo.servers.intake import Intake, Request
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.servers.service import ServerConfig, Service, Tensors

# An idle server's ranks meet this often, so that no collective times out and a signal to any rank is noticed.
HEARTBEAT_S = 1.0


def serve(service: Service, config: ServerConfig, *, group: dist.ProcessGroup) -> None:
    """Serve until SIGTERM or SIGINT reaches any rank. To be called on every rank, in the main thread.

    Args:
        group: all ranks of the job, on a backend for CPU tensors (gloo).

    Raises:
        ConfigError: the address cannot be listened on (rank 0; the others fail when it leaves them).
        RuntimeError: the ranks no longer agree, a rank was lost, or Triton ended.
    """
    with _stop_signals() as stop:
        if dist.get_rank(group) == 0:
            intake = Intake(service, config)
            with intake.open():
                _run(service, group, stop, intake)
        else:
            _run(service, group, stop, None)


def _run(service: Service, group: dist.ProcessGroup, stop: threading.Event, intake: Intake | None) -> None:
    """Execute what rank 0's intake brings, until any rank is asked to stop."""
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


@dataclass(frozen=True)
class _Header:
    """Announces a request to the other ranks; without an endpoint it is a mere heartbeat."""

    endpoint: str = ""
    arrays: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)


def _share(request: Request | None, group: dist.ProcessGroup) -> tuple[str, Tensors]:
    """Give rank 0's request to all ranks. Returns its endpoint, "" for a heartbeat, and its arrays as tensors."""
    tensors: Tensors = {}
    header = _Header()
    if request:
        # A copy, for the arrays lie in memory that Triton takes back after the answer; contiguous, for gloo.
        tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in request.arrays.items()}
        header = _Header(request.endpoint, {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
    source = dist.get_global_rank(group, 0)
    shared = [header]
    dist.broadcast_object_list(shared, source, group)
    header = shared[0]
    if not request:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in header.arrays.items()}
    for tensor in tensors.values():
        dist.broadcast(tensor, source, group)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            tensors[name] = tensor.bool() if name == "mask" else tensor.long()
    return header.endpoint, tensors


def _agree(outcome: Any, stop: threading.Event, group: dist.ProcessGroup) -> bool:
    """Whether any rank was asked to stop.

    Raises:
        RuntimeError: the request failed on some ranks only.
    """
    failed_here = isinstance(outcome, ServiceError)
    counts = torch.tensor([failed_here, stop.is_set()], dtype=torch.int64)
    dist.all_reduce(counts, group=group)
    failed, stopping = counts.tolist()
    if failed not in (0, dist.get_world_size(group)):
        here = f"here with: {outcome}" if failed_here else "but not here"
        raise RuntimeError(f"a request failed on {failed} of {dist.get_world_size(group)} ranks, {here}")
    return bool(stopping)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set the event, in place of ending the process."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
