"""What a CUDA graph is, on a CPU: the operations of a function, run again on the same tensors.

Like a graph, a tape knows nothing of Python: whatever a function has read of its host, it reads never again, what it
gives are the tensors that it gave when it was recorded, and it may wait for no tensor's values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITS):
            raise RuntimeError(f"{func} waits for the device, which a recording cannot")
        out = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.played:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(new, Tensor):
                    old.copy_(new)
                elif hasattr(new, "wait"):  # of a collective
                    new.wait()


class Recorder:
    """Records on a CPU, as `GraphRecorder` does on a GPU, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        with _Tape() as tape:
            outputs = step()
        for output in outputs:
            output.fill_(torch.nan)  # a graph computes nothing while it is recorded

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return outputs, replay
