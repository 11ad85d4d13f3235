"""A model that shares its device with others: while they run, its weights and optimizer state wait in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.runner import ModelRunner


class Runs(Protocol):
    """Owner of a model, which it may replace by another one."""

    runner: ModelRunner


class Offload:
    """Moves a model's memory in place: weights, views of gradient buffers and optimizer moments stay the same tensor
    objects, whose storages are empty while the model is set aside.

    Gradients come back with arbitrary content; every update begins by zeroing them. On a CPU `turn` moves nothing.

    The mechanism is proven on CPU tensors. It has not been run on a GPU.
    """

    def __init__(self, model: Runs) -> None:
        self._model, self._in_turn = model, False
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._moved: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._gradients: list[tuple[torch.UntypedStorage, int]] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run a block that builds or uses the model, which is on the device inside it alone; turns may be nested."""
        if self._in_turn:
            yield
            return
        self.restore()
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False
        if device.on_gpu():
            self.set_aside()

    def set_aside(self) -> None:
        """Move weights and optimizer state to pinned host memory. The host waits for no copy."""
        for storage in _storages(_gradients(self._model.runner)):
            self._gradients.append((storage, storage.nbytes()))
            storage.resize_(0)
        storages = _storages(_weights_and_states(self._model.runner))
        sizes = [storage.nbytes() for storage in storages]
        # host memory still has the weights of a model that is not trained
        is_kept = len(self._memory) > 0 and self._model.runner.optimizer is None
        if sum(sizes) > len(self._memory):  # the first time, or with moments that the first update has made
            device.synchronize()  # a copy back to the device may still read from it
            self._memory = device.locked_memory(sum(sizes), torch.uint8)
        for storage, host in zip(storages, self._memory[: sum(sizes)].split(sizes), strict=True):
            if not is_kept:
                host.copy_(_bytes(storage), non_blocking=True)
            storage.resize_(0)
            self._moved.append((storage, host))

    def restore(self) -> None:
        """Move back what `set_aside` moved. Host memory is kept for the next turn: to lock it takes long."""
        for storage, host in self._moved:
            storage.resize_(len(host))
            _bytes(storage).copy_(host, non_blocking=True)
        for storage, size in self._gradients:
            storage.resize_(size)
        self._moved, self._gradients = [], []


def _gradients(runner: ModelRunner) -> Iterator[Tensor]:
    for chunk in runner.chunks:
        for buffer in chunk.buffers if runner.optimizer else ():
            yield buffer.grad_data


def _weights_and_states(runner: ModelRunner) -> Iterator[Tensor]:
    for chunk in runner.chunks:
        yield from unwrap(chunk).parameters()
        yield from unwrap(chunk).buffers()
    for part in runner.optimizer.chained_optimizers if runner.optimizer else ():
        if part.optimizer is not None:  # a pipeline stage without adapters has none
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _storages(tensors: Iterator[Tensor]) -> list[torch.UntypedStorage]:
    """Return the tensors' storages on the device, each once; several tensors may share one."""
    storages: dict[int, Any] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and tensor.device.type == device.device().type:
            storages[storage.data_ptr()] = storage
    return list(storages.values())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
