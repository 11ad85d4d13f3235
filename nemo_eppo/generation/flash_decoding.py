"""Attention of the newest token of each sequence over the cache, as one Triton kernel for GPUs.

Torch's fused kernels compute all columns of a row and group in one block, read columns beyond a shorter row's end, and
need a mask. Here the columns are split between parallel blocks, whose results are joined by their softmax denominators
(Flash-Decoding, Dao et al. 2023), and a row reads only the columns that it sees. A kernel of our own needs no package
beside torch, handles sliding windows and capped logits, and can be tested without a GPU. **Not run on one yet**: the
tests run it in Triton's interpreter, and compile it for GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def flash_decode(
    query: Tensor,
    cache: Tensor,
    positions: Tensor,
    longest: int,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    blocks: int | None = None,
) -> Tensor:
    """Softmax attention of each row's newest token to itself and the columns before it -> [n, G, R, D].

    Args:
        query: [n, G, R, D], R heads for each of G groups of keys and values; its heads are adjacent.
        cache: keys and values [n, G, 2, W, D], its columns are adjacent.
        positions: [n] column of each newest token.
        longest: upper bound of the columns that a row sees; all rows are split as if they had so many.
        window: a token sees only this many columns, up to its own; None for all.
        scale: factor of the logits; None for D ** -0.5.
        softcap: c of c * tanh(logit / c); None for none.
        blocks: number of blocks to fill; None for four on each multiprocessor of the GPU.
    """
    rows, groups, heads, width = query.shape
    tile = _columns_tile(width, query.element_size())
    if blocks is None:
        blocks = 4 * torch.cuda.get_device_properties(query.device).multi_processor_count
    wanted = max(1, min(-(-blocks // (rows * groups)), longest // (4 * tile)))
    columns = -(-longest // (wanted * tile)) * tile  # of a split
    splits = -(-longest // columns)
    parts = torch.empty(rows, groups, splits, heads, width, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(rows, groups, splits, heads, dtype=torch.float32, device=query.device)
    _attend_split[rows * groups, splits](
        query,
        cache,
        positions,
        parts,
        log_sums,
        *query.stride()[:2],
        *cache.stride()[:3],
        splits,
        columns,
        longest if window is None else window,
        width**-0.5 if scale is None else scale,
        1.0 if softcap is None else softcap,
        CAPPED=softcap is not None,
        GROUPS=groups,
        HEADS=heads,
        WIDTH=width,
        HEADS_TILE=max(16, triton.next_power_of_2(heads)),  # tensor cores take no fewer
        WIDTH_TILE=max(16, triton.next_power_of_2(width)),
        COLUMNS_TILE=tile,
    )
    out = parts[:, :, 0] if splits == 1 else (parts * log_sums.softmax(2).unsqueeze(-1)).sum(2)
    return out.to(query.dtype)


def _columns_tile(width: int, bytes_each: int) -> int:
    """Columns that a block loads at once: several such loads of 16 KB are under way."""
    return 2**14 // (bytes_each * max(128, triton.next_power_of_2(width)))


# these numbers change while a batch is decoded, and Triton would compile a new kernel for a new value
@triton.jit(do_not_specialize=["splits", "columns", "window"])
def _attend_split(  # type: ignore[no-untyped-def]
    query,
    cache,
    positions,
    parts,
    log_sums,
    query_row,
    query_group,
    cache_row,
    cache_group,
    cache_values,
    splits,
    columns,
    window,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    COLUMNS_TILE: tl.constexpr,
):
    """One split of the columns of one row and group: softmax average of its values, and log of its denominator."""
    pair, split = tl.program_id(0), tl.program_id(1)
    row, group = (pair // GROUPS).to(tl.int64), pair % GROUPS
    head, channel = tl.arange(0, HEADS_TILE)[:, None], tl.arange(0, WIDTH_TILE)[None, :]
    real = (head < HEADS) & (channel < WIDTH)
    queries = tl.load(query + row * query_row + group * query_group + head * WIDTH + channel, real, 0.0)
    keys = cache + row * cache_row + group * cache_group
    end = tl.load(positions + row).to(tl.int32) + 1
    begin = tl.maximum(end - window, 0)
    first = tl.maximum(split * columns, begin // COLUMNS_TILE * COLUMNS_TILE)
    last = tl.minimum((split + 1) * columns, end)
    highest = tl.full([HEADS_TILE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_TILE], tl.float32)
    out = tl.zeros([HEADS_TILE, WIDTH_TILE], tl.float32)
    for start in range(first, last, COLUMNS_TILE):
        column = start + tl.arange(0, COLUMNS_TILE)
        seen = (column >= begin) & (column < last)
        place, present = keys + column[:, None] * WIDTH + channel, seen[:, None] & (channel < WIDTH)
        logits = tl.dot(queries, tl.trans(tl.load(place, present, 0.0)), input_precision="ieee") * scale
        if CAPPED:
            logits = softcap * (1 - 2 / (tl.exp(2 * logits / softcap) + 1))  # Triton has no tanh
        logits = tl.where(seen[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights, kept = tl.exp(logits - higher[:, None]), tl.exp(highest - higher)
        values = tl.load(place + cache_values, present, 0.0)
        out = out * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        highest = higher
    target = (pair * splits + split) * HEADS + head
    some = tl.where(total == 0, 1.0, total)  # 0 where this row has no column in this split; NaN stays NaN
    log_sum = tl.where(total == 0, float("-inf"), highest + tl.log(some))
    tl.store(log_sums + target, log_sum[:, None], head < HEADS)
    tl.store(parts + target * WIDTH + channel, out / some[:, None], real)
