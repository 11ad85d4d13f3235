"""The memory of a decoder's keys and values: as much as the present sequences need, not what they may come to need.

Most responses end long before their limit; room for all of them at the limit would be several times what is ever used.
"""

import torch
from torch import Tensor

from nemo_eppo.megatron import device

_MIN_GROWTH = 128  # columns added at once, at least: with fewer, short sequences would move every few tokens


class KeyValueCache:
    """Keys and values [rows, G, 2, W, D] of each layer, on the device; the columns of a row are adjacent.

    When a sequence outgrows the W columns, the rows in use are copied to a cache with half as many columns again as the
    longest sequence has, up to a limit: amortised, a token costs a constant number of copies. Layers are copied one
    after the other, so that at most one of them is there twice.

    Args:
        layers: number of layers of each chunk of this rank.
        groups: G, groups of keys and values of this rank.
        width: D, numbers of a key.
    """

    def __init__(self, layers: list[int], groups: int, width: int, dtype: torch.dtype) -> None:
        self._empty = torch.empty(0, groups, 2, 0, width, dtype=dtype, device=device.device())
        self.chunks = [[self._empty] * count for count in layers]
        self._limit = 0

    @property
    def columns(self) -> int:
        """W."""
        return self.chunks[0][0].size(3)

    def start(self, limit: int) -> None:
        """Free all memory; a row will have up to `limit` columns."""
        self.chunks = [[self._empty] * len(layers) for layers in self.chunks]
        self._limit = rounded(limit)

    def make_room(self, rows: int, columns: int) -> bool:
        """Make room for the first `rows` rows, which are those in use, and `columns` columns. New columns hold 0.

        Returns:
            whether the layers have moved; rows that are not in use are then gone.
        """
        old_rows, old_columns = self.chunks[0][0].size(0), self.columns
        if rows <= old_rows and columns <= old_columns:
            return False
        if columns > old_columns:
            columns = min(rounded(columns + max(columns // 2, _MIN_GROWTH)), self._limit)
        else:
            columns = old_columns
        for layers in self.chunks:
            for number, old in enumerate(layers):
                # masked columns weigh 0 in attention, and 0 * NaN would be NaN
                layers[number] = old.new_zeros(rows, *old.shape[1:3], columns, old.size(-1))
                layers[number][:old_rows, ..., :old_columns, :] = old[:rows]
        return True

    def copy(self, source: int | Tensor, target: int | slice, columns: int) -> None:
        """Copy the first columns of a row, or of several, to other rows."""
        for layer in (layer for layers in self.chunks for layer in layers):
            layer[target, ..., :columns, :] = layer[source, ..., :columns, :]


def rounded(columns: int) -> int:
    """Round a number of columns up to the multiple of the device's attention."""
    multiple = device.cached_tokens_multiple()
    return -(-columns // multiple) * multiple
