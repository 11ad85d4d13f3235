"""Sequence packing: rows of different lengths as one sequence without padding, in micro-batches of equal work.

Attention and rotary positions begin anew with every row (Megatron's `thd` format), so that a packed row gives the same
outputs as alone. Losses do not see packs: outputs are put back into padded rows first.
"""

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.specs import has_transformer_engine


def balanced_packs(lengths: Sequence[int], budget: int, multiple: int, hidden_size: int) -> list[list[int]]:
    """Deal items to packs of at most `budget` tokens and nearly equal work: longest first, to the least loaded pack.

    Args:
        lengths: tokens of each item. One longer than `budget` raises the budget to its own length.
        multiple: the number of packs is a multiple of this; some are empty where items are too few.
        hidden_size: H of the model. An item of length l costs l * (1 + l / 12H): the second part is attention's,
            counting only products with weights and causal attention, for a layer of 12 H^2 weights.

    Returns:
        the items of each pack. With `multiple` packs fewer this rule finds no room; for n items it tries O(log n)
        numbers of packs, each in O(n log n) steps.
    """
    budget = max(budget, *lengths)
    order = sorted(range(len(lengths)), key=lambda item: (-lengths[item], item))

    def deal(count: int) -> list[list[int]] | None:
        """Return the items dealt to `count` packs; None if one finds no room."""
        packs: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        # Items come longest first: a pack with room for one has room for the next, unless it has just been filled up.
        roomy = [(0.0, pack) for pack in range(count)]  # a heap of (work, pack)
        filled: list[tuple[int, float, int]] = []  # a heap of (tokens, work, pack) that may have room again
        for item in order:
            length = lengths[item]
            while filled and filled[0][0] + length <= budget:
                heappush(roomy, heappop(filled)[1:])
            if not roomy:
                return None
            work, pack = heappop(roomy)
            packs[pack].append(item)
            tokens[pack] += length
            heappush(filled, (tokens[pack], work + length * (1 + length / (12 * hidden_size)), pack))
        return packs

    # An item finds no room only where all packs are more than half full, so twice the least number is enough.
    least, enough = (-(-times * sum(lengths) // (budget * multiple)) for times in (1, 2))
    more = bisect_left(range(least, enough), True, key=lambda number: deal(number * multiple) is not None)
    packs = deal((least + more) * multiple)
    assert packs is not None
    return packs


def sequence_numbers(tokens: Tensor, packed: PackedSeqParams | None) -> Tensor:
    """Return [b, s], the number of the sequence at each position of `tokens`: a row's own, or that within a pack."""
    if packed is None:
        return torch.arange(tokens.size(0), device=tokens.device).unsqueeze(1).expand_as(tokens)
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    return torch.searchsorted(packed.cu_seqlens_q[1:].to(tokens), positions, right=True)


class Packing:
    """Converts micro-batches between padded [b, s] and packed [1, n].

    Args:
        lengths: [b] tokens of each row, in the host's memory; width: s; size: n, at least the sum of the lengths.
    """

    def __init__(self, lengths: Tensor, width: int, size: int) -> None:
        columns = torch.arange(width)
        self._shape, place = (len(lengths), width), device.device()
        self._places = (columns < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1).to(place)  # [tokens] of [b * s]
        self._tail = size - len(self._places)
        # the tail is a sequence of its own: nobody attends to it
        sizes = F.pad(lengths, (0, 1), value=self._tail) if self._tail else lengths
        starts, longest = F.pad(sizes.cumsum(0), (1, 0)).to(torch.int32), int(sizes.max())
        # TransformerEngine's kernels read `starts` on the device; `CoreAttention` splits rows on the host. For it, the
        # longest row is not rounded: were it as long as the pack, Megatron's rotary positions would not restart.
        if has_transformer_engine():
            starts, longest = starts.to(place), longest + -longest % device.tokens_multiple()
        self.params = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
        )

    def pack(self, padded: Tensor, fill: int) -> Tensor:
        """[b, s] -> [1, n]; the tail holds `fill`."""
        return F.pad(padded.flatten()[self._places], (0, self._tail), value=fill).unsqueeze(0)

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, n, C] -> [b, s, C], 0 beyond each row's length; gradients pass."""
        rows, width = self._shape
        flat = packed.new_zeros(rows * width, packed.size(2))
        return flat.index_copy(0, self._places, packed[0, : len(self._places)]).view(rows, width, -1)
