"""Decoding steps whose kernels are launched together: a step of a deep model is thousands of small kernels, and their
launches one by one take a host longer than a GPU needs to run them. **Not run on a GPU yet.**
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_eppo.megatron import device

_FEWEST_ROWS = 8

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Runs a function of tensors once, in whatever way records it; returns its outputs, whose values may be anything, and a
function that computes them again, in place, from what its inputs hold then."""


class Advance(Protocol):
    """Work that recordings hold."""

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Any:
        """Append one token [n] at its position [n] to n rows, which see `longest` columns; returns a named tuple of
        tensors [n, ...].

        It does the same for all values of the tensors, and waits for none of them.
        """


class ReplayedSteps:
    """The steps of a decoder between two calls of `Decoder.start`, while the tensors that they use stay where they are
    and adapters stay on, or off.

    A step's first run with some number of rows and columns is an ordinary one, which also loads kernels and opens
    connections between ranks; the second records, all others replay. The number of rows is rounded up: free rows take
    part with some token at position 0, and nobody looks at them.

    Args:
        rows: number of the cache's rows.
    """

    def __init__(self, advance: Advance, rows: int, record: Recorder) -> None:
        self._advance, self._rows, self._record = advance, rows, record
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device.device())
        self._positions = self._tokens.clone()
        self._recorded: dict[tuple[int, int], tuple[Any, Callable[[], None]] | None] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, longest: int) -> Any:
        """Advance tokens [n] at positions [n]; the outputs [n, ...] stay what they are."""
        used = len(tokens)
        self._tokens[:used], self._positions[:used], self._positions[used:] = tokens, positions, 0
        size = min(self._rows, max(_FEWEST_ROWS, 1 << (used - 1).bit_length()))
        key = size, longest
        step = partial(self._advance, self._tokens[:size], self._positions[:size], longest)
        if key not in self._recorded:
            self._recorded[key] = None
            outputs = step()
        else:
            recorded = self._recorded[key] or self._record(step)
            self._recorded[key] = recorded
            outputs, replay = recorded
            replay()
        return type(outputs)(*(output[:used].clone() for output in outputs))


class GraphRecorder:
    """Records CUDA graphs, which share their memory: one runs at a time, and what a graph gives stays its own."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for events meanwhile, in a thread of its own
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = step()
        return outputs, graph.replay
