"""A frozen copy of a model's weights that can take the place of the live ones in the same modules."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap


class FrozenWeights:
    """Copies this rank's weights to CPU memory when it is created.

    Inside `active()`, the modules hold the frozen weights and CPU memory the live ones, so that a reference policy
    needs no second model on the device. On a GPU the copies are queued; the host does not wait for them.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._parameters = [p for chunk in chunks for p in unwrap(chunk).parameters()]
        sizes: Counter[torch.dtype] = Counter()
        for parameter in self._parameters:
            sizes[parameter.dtype] += parameter.numel()
        self._memory = {dtype: device.locked_memory(size, dtype) for dtype, size in sizes.items()}
        self._aside: list[Tensor] = []
        free = dict(self._memory)
        for parameter in self._parameters:
            own, free[parameter.dtype] = free[parameter.dtype].tensor_split([parameter.numel()])
            self._aside.append(own.view(parameter.shape).copy_(parameter.detach()))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the block with the frozen weights; no gradients, no updates inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, aside in zip(self._parameters, self._aside, strict=True):
            live = parameter.clone()
            parameter.copy_(aside, non_blocking=True)
            aside.copy_(live, non_blocking=True)
