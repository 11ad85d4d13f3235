"""Decoding steps whose kernels are launched together: a deep model's step is thousands of small kernels, which a host
launches one by one more slowly than a GPU runs them. **Not run on a GPU yet.**
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

_FEWEST_ROWS = 8

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records a function's tensor operations without running them; the returned function runs them, on the same tensors."""


class Advance(Protocol):
    """The work that is recorded."""

    def __call__(self, longest: int, *inputs: Tensor) -> Any:
        """Append one token to each of n rows, which see `longest` columns; inputs, and the fields of the returned named
        tuple, are [n, ...].

        Its operations do not depend on the inputs' values, and it waits for none of them. Free rows, of zeros, are
        allowed.
        """


class ReplayedSteps:
    """A chunk's part of decoding steps between two moves of the cache, while its tensors stay where they are and
    adapters stay on, or off.

    The first run with some number of rows and columns is an ordinary one, which also loads kernels and opens
    connections between ranks; the second records, all others replay. The number of rows is rounded up: free rows take
    part with inputs of 0, and their outputs are ignored.

    Args:
        rows: number of the cache's rows.
    """

    def __init__(self, advance: Advance, rows: int, record: Recorder) -> None:
        self._advance, self._rows, self._record = advance, rows, record
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._recorded: dict[tuple[int, int], Callable[[], None] | None] = {}

    def __call__(self, longest: int, *inputs: Tensor) -> Any:
        """Advance with these inputs [n, ...], always the same number of them; the outputs [n, ...] are copies."""
        used = len(inputs[0])
        self._inputs = self._inputs or [given.new_empty(self._rows, *given.shape[1:]) for given in inputs]
        for fixed, given in zip(self._inputs, inputs, strict=True):
            fixed[:used], fixed[used:] = given, 0
        size = min(self._rows, max(_FEWEST_ROWS, 1 << (used - 1).bit_length()))
        step = partial(self._run, size, longest)
        if (size, longest) not in self._recorded:
            self._recorded[size, longest] = None
            step()
        else:
            replay = self._recorded[size, longest] or self._record(step)
            self._recorded[size, longest] = replay
            replay()
        return type(self._outputs)(*(output[:used].clone() for output in self._outputs))

    def _run(self, size: int, longest: int) -> None:
        """Advance the first rows, with outputs in memory that all recordings share."""
        outputs = self._advance(longest, *(fixed[:size] for fixed in self._inputs))
        if self._outputs is None:
            self._outputs = type(outputs)(*(output.new_empty(self._rows, *output.shape[1:]) for output in outputs))
        for fixed, output in zip(self._outputs, outputs, strict=True):
            fixed[:size] = output


class GraphRecorder:
    """Records CUDA graphs that share one memory pool, since one runs at a time."""

    def __init__(self) -> None:
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # torch refuses a memory pool whose graphs are all gone if something, as cuBLAS's workspace, is left in it
        pool = next((other.pool() for other in self._alive), None)
        # NCCL's watchdog thread queries events meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        self._alive.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay
