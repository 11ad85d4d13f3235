"""Run a function on several ranks: processes forked from this one, joined by gloo."""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # like transformers' tokenizers, what each rank would otherwise import for itself
import transformers.models.auto.tokenization_auto  # noqa: F401


def free_port() -> int:
    """A port that nothing takes before it is used: below those that the kernel gives to outgoing connections, and that
    servers choose themselves, and no other worker's of pytest-xdist."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 12_000 + 1000 * (worker % 8) + random.SystemRandom().randrange(1000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _pack(value: Any) -> bytes:
    # plain bytes: a tensor sent as such lives in memory of the worker, which is gone by the time it is read
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _worker(rank: int, world_size: int, port: int, pipe: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # so that helper processes of this rank can be ended with it
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        pipe.send((True, _pack(fn(*args))))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        with contextlib.suppress(EOFError):  # to the end of all: rank 0 has the store by which the others' groups meet
            pipe.recv()
        os._exit(0)  # no atexit hooks inherited from the parent


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call `fn(*args)` on `world_size` forked ranks and return their results by rank; the first failure is raised."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(rank, world_size, port, there, fn, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        results, waiting = {}, dict(enumerate(pipes))
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting.values()), timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting)} gave no result within {timeout} s")
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, value = waiting.pop(rank).recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} died without a result") from None
                if not ok:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = torch.load(io.BytesIO(value), weights_only=False)
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # the group exists once the worker has started
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
