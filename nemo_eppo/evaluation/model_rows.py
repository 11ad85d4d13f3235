"""Rows that a model computes on all ranks, window by window, for a file that an interrupted command goes on with."""

from collections.abc import Callable, Iterable

import torch.distributed as dist

from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.evaluation.rows_progress import rows_progress
from nemo_eppo.megatron import runtime

WINDOW = 16
"""Micro-batches whose rows are sorted by length, and written, together."""


def append_rows(
    output: RowsFile, total: int, size: int, lines: Callable[[slice], Iterable[str]], what: str = ""
) -> None:
    """Compute the rows that the output lacks and append them, and show the progress; collective.

    All ranks must have created `output` before, and may read the file afterwards.

    Args:
        total: number of rows of the whole output.
        size: rows that are computed, and written, together.
        lines: makes the output lines of a slice of the rows; it is called on all ranks.
        what: what the rows are, for the progress.
    """
    writes, group = dist.get_rank() == 0, runtime.control_group()
    dist.barrier(group)  # all ranks have read the output, which now grows
    if writes:
        output.begin()
    with rows_progress(total, output.done, what=what, shown=writes) as add:
        for start in range(output.done, total, size):
            window = slice(start, min(start + size, total))
            made = lines(window)
            if writes:
                output.append(made)
            add(window.stop - start)
    dist.barrier(group)  # all is written
