"""A distributed optimizer's states in checkpoints: each rank writes and reads what it has, and no other's.

megatron-core (0.16) has a format that loads under any layout, with an array of a parameter's shape for each of its
states, but gathers them on one rank while training waits. A rank's share of a parameter is a range of its numbers, row
after row: the end of a row, whole rows, the beginning of a row. As three blocks of that array, it needs no gathering.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor


def sharded_states(optimizer: Any, model_state: ShardedStateDict, *_: Any) -> list[ShardedTensor]:
    """Describe this rank's states, fp32 weights included, as blocks of the arrays of a checkpoint; replaces
    megatron-core's `sharded_param_state_fully_reshardable`, further arguments of which are not needed.

    Args:
        optimizer: megatron-core's DistributedOptimizer.
        model_state: describes its parameters, themselves as data, as arrays of a checkpoint.

    Returns:
        blocks whose data are the optimizer's own tensors: loading them changes these in place.
    """
    described, _ = extract_sharded_tensors_and_factories(model_state)
    arrays = {entry.data: entry for entry in nested_values(described)}
    blocks = []
    for parameter, first, last in _ranges(optimizer):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        for array, begins in _arrays(arrays[parameter]):
            rows, start, end = array.local_shape, max(first, begins), min(last, begins + array.data.numel())
            width = 1 if len(rows) == 1 else array.data[0].numel()
            for block in _blocks(start - begins, end - begins, width):
                taken = slice(block.begins + begins - first, block.begins + begins - first + block.size)
                blocks += [
                    _block(array, f"optimizer.state.{name}.{array.key}", state[taken], block)
                    for name, state in states.items()
                    if name != "step"
                ]
    return blocks


class _Block(NamedTuple):
    """Rows of a matrix, or a part of one row."""

    row: int
    column: int
    rows: int
    columns: int
    begins: int
    """Place of its first number in the matrix, row after row."""

    @property
    def size(self) -> int:
        return self.rows * self.columns


def _blocks(start: int, end: int, width: int) -> Iterator[_Block]:
    """Divide a range of the numbers of a matrix with rows of `width` into blocks; none if it is empty."""
    while start < end:
        row, column = divmod(start, width)
        rows = (end - start) // width if column == 0 else 0
        block = _Block(row, column, rows or 1, width if rows else min(width - column, end - start), start)
        yield block
        start += block.size


def _ranges(optimizer: Any) -> Iterator[tuple[Tensor, int, int]]:
    """Yield each parameter of which this rank has states, and their range in it: [first, last)."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _arrays(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """Yield the arrays that hold a parameter, one behind the other, and where each begins in it."""
    shape = torch.empty_like(entry.data, device="meta")
    if isinstance(entry, ShardedTensor):
        yield entry, 0
        return
    begins = 0
    for array in nested_values(entry.build_fn(entry.key, shape, entry.replica_id, None)):
        yield array, begins
        begins += array.data.numel()


def _block(array: ShardedTensor, key: str, data: Tensor, block: _Block) -> ShardedTensor:
    vector = len(array.local_shape) == 1
    place, sizes = ((block.row,), (block.rows,)) if vector else ((block.row, block.column), (block.rows, block.columns))
    before, here = array.global_offset[: array.prepend_axis_num], array.global_offset[array.prepend_axis_num :]
    shape = (*(1 for _ in before), *sizes)
    return ShardedTensor(
        key=key,
        data=data.view(shape),
        dtype=data.dtype,
        local_shape=shape,
        global_shape=array.global_shape,
        global_offset=(*before, *(own + more for own, more in zip(here, place, strict=True))),
        axis_fragmentations=None,
        replica_id=(*array.replica_id[:2], 0),  # other data-parallel ranks have other blocks
        allow_shape_mismatch=array.allow_shape_mismatch,
    )
