"""Decoding steps whose kernels are launched together: a step of a deep model is thousands of small kernels, and their
launches one by one take a host longer than a GPU needs to run them. **Not run on a GPU yet.**
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

_FEWEST_ROWS = 8

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Records what a function does with tensors, without doing it; the returned function does it, on the same tensors."""


class Advance(Protocol):
    """Work that recordings hold."""

    def __call__(self, longest: int, *inputs: Tensor) -> Any:
        """Append one token to each of n rows, which see `longest` columns; inputs, and what the returned named tuple
        holds, are [n, ...].

        It does the same for all values of the inputs, and waits for none of them. With zeros for a free row it works.
        """


class ReplayedSteps:
    """A part of the steps of a decoder between two moves of its cache, while the tensors that it uses stay where they
    are and adapters stay on, or off.

    Its first run with some number of rows and columns is an ordinary one, which also loads kernels and opens
    connections between ranks; the second records, all others replay. The number of rows is rounded up: free rows take
    part, their inputs are 0, and nobody looks at what comes of them.

    Args:
        rows: number of the cache's rows.
    """

    def __init__(self, advance: Advance, rows: int, record: Recorder) -> None:
        self._advance, self._rows, self._record = advance, rows, record
        self._inputs: list[Tensor] = []
        self._outputs: Any = None
        self._recorded: dict[tuple[int, int], Callable[[], None] | None] = {}

    def __call__(self, longest: int, *inputs: Tensor) -> Any:
        """Advance with these inputs [n, ...], always as many; the outputs [n, ...] stay what they are."""
        used = len(inputs[0])
        self._inputs = self._inputs or [given.new_empty(self._rows, *given.shape[1:]) for given in inputs]
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept[:used], kept[used:] = given, 0
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
        """Advance the first rows; what comes of them goes to memory that all recordings share."""
        outputs = self._advance(longest, *(kept[:size] for kept in self._inputs))
        if self._outputs is None:
            self._outputs = type(outputs)(*(output.new_empty(self._rows, *output.shape[1:]) for output in outputs))
        for kept, output in zip(self._outputs, outputs, strict=True):
            kept[:size] = output


class GraphRecorder:
    """Records CUDA graphs, which share their memory, for one runs at a time."""

    def __init__(self) -> None:
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # torch refuses a pool of memory whose graphs are all gone, if something is left in it, as cuBLAS's workspace is
        pool = next((other.pool() for other in self._alive), None)
        # NCCL's watchdog asks for events meanwhile, in a thread of its own
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        self._alive.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay
