"""What a CUDA graph is, on a CPU: the operations of a function, which run later, on the same tensors.

Like a graph, a tape knows nothing of Python: whatever a function has read of its host, it reads never again. Nothing is
changed while it is recorded, and the function may wait for no tensor's values.
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
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()  # memory that operations have made
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITS):
            raise RuntimeError(f"{func} waits for the device, which a recording cannot")
        given = memory((args, kwargs))
        if func._schema.is_mutable:
            for number, storage in given.items():
                if number not in self._own and number not in self._before:
                    self._before[number] = storage, storage.clone()
        out = func(*args, **(kwargs or {}))
        self._own |= memory(out).keys() - given.keys()
        self._operations.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    def play(self) -> None:
        for func, args, kwargs, outputs in self._operations:
            for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(new, Tensor):
                    old.copy_(new)
                elif hasattr(new, "wait"):  # of a collective
                    new.wait()


def memory(tree: Any) -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors in a tree, by a number."""
    storages = (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {storage._cdata: storage for storage in storages}


class Recorder:
    """Records on a CPU, as `GraphRecorder` does on a GPU, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with _Tape() as tape:
            step()
        tape.undo()

        def replay() -> None:
            self.replayed += 1
            tape.play()

        return replay
