"""A frozen copy of a model's weights that can take the place of the live ones in the same modules."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nemo_eppo.megatron import device
from nemo_eppo.megatron.model import unwrap


class FrozenWeights:
    """Copies this rank's weights to CPU memory when it is created.

    Inside `active()`, the modules hold the frozen weights and CPU memory the live ones, so that a reference policy
    needs no second model on the device. On a GPU the copies are queued; the host does not wait for them.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._parameters = [p for chunk in chunks for p in unwrap(chunk).parameters()]
        self._aside = [p.detach().to("cpu", copy=True) for p in self._parameters]
        if device.on_gpu():
            self._aside = [tensor.pin_memory() for tensor in self._aside]

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
