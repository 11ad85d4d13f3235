"""Starts and ends the distributed part of a process: torch.distributed, Megatron's parallel groups, seeds."""

import datetime
import ipaddress
import os
import random
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import device
from nemo_eppo.settings.model import ParallelConfig

PATIENCE = datetime.timedelta(hours=3)
"""How long ranks wait for work of a single rank: a server's answer, digests of a large checkpoint."""
TIMEOUT_MINUTES = 30.0
"""How long a collective waits."""
_OPEN_FILES = 65_536  # soft limit of open files
_control: dist.ProcessGroup | None = None


def world_size() -> int:
    """Return the number of this job's ranks, which torchrun or srun set; 1 for a plain `python script.py`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_one_machine() -> bool:
    """Tell whether all ranks of the job run on this machine, as far as its environment says."""
    return world_size() == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def initialize(parallel: ParallelConfig, seed: int, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
    """Join the job's ranks, make Megatron's groups, seed every generator.

    Args:
        parallel: the layout; checked against the world size before anything is joined.
        seed: the same on every rank. From it, each pipeline stage derives its own for torch, so that stages start with
            different layers, and Megatron one for each tensor-parallel rank.
        timeout_minutes: a collective that waits longer than this ends the job; see also PATIENCE.
    """
    global _control
    parallel.data_parallel_size(world_size())
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store = _store(timeout)
        if on_one_machine():
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")  # else they listen on an outer interface
        else:
            _check_own_name()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < limit:  # 1,024 for most logins, and gloo connects to every rank
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        device.select()
        # without device_id: NCCL would split a communicator for each of Megatron's hundreds of groups, used or not
        dist.init_process_group(
            device.distributed_backend(),
            store=store,
            rank=int(os.environ.get("RANK", "0")),
            world_size=world_size(),
            timeout=timeout,
        )
        _control = dist.new_group(backend="gloo", timeout=PATIENCE)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
        )
    seed_all(seed)


def _store(timeout: datetime.timedelta) -> Store:
    """Make the store by which the ranks find each other; torch's own would listen on all interfaces.

    It is torchrun's, or that of rank 0 at MASTER_ADDR and MASTER_PORT, or of a single rank that needs no port.
    """
    if world_size() == 1:
        return HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listener = _listen(host, port) if serves else None
    return TCPStore(host, port, world_size(), serves, timeout, master_listen_fd=listener)


def _listen(host: str, port: int) -> int | None:
    """Listen at this address alone and return the socket's descriptor.

    None if other machines cannot reach the address: some have a line `127.0.1.1 <own name>` in /etc/hosts.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(address[0]).is_loopback and not on_one_machine():
            return None
        return socket.create_server(address, family=family, backlog=1024).detach()
    except OSError as error:
        raise ConfigError(
            f"MASTER_ADDR = {host}, MASTER_PORT = {port}: expected a free port of the machine of rank 0 ({error})"
        ) from None


def _check_own_name() -> None:
    """Raise ConfigError if gloo would tell ranks on other machines an address that is their own."""
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:  # gloo looks for another one then
        return
    if "GLOO_SOCKET_IFNAME" not in os.environ and ipaddress.ip_address(address).is_loopback:
        raise ConfigError(
            f"this machine knows its own name {name} as {address}, at which ranks on other machines do not find it: "
            "set GLOO_SOCKET_IFNAME to the network interface that they reach (ip -brief address lists them)"
        )


def seed_all(seed: int, step: int = 0) -> None:
    """Seed every generator anew, as `initialize` describes; each `step` gives other numbers."""
    seed = (seed + 1_000_003 * step) % 2**31
    random.seed(seed)
    np.random.seed(seed)
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed every generator for a block, as `seed_all` does; then restore their states."""
    tracker = get_cuda_rng_tracker()
    python_state, numpy_state, megatron_states = random.getstate(), np.random.get_state(), tracker.get_states()
    try:
        with torch.random.fork_rng([device.device()] if device.on_gpu() else []):
            seed_all(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        tracker.set_states(megatron_states)


def shutdown() -> None:
    """Destroy the process groups, so that the job ends without warnings."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def control_group() -> dist.ProcessGroup:
    """Return the gloo group of all ranks, for objects and CPU tensors; it waits for up to PATIENCE."""
    assert _control is not None, "initialize() comes first"
    return _control
