"""Computes rows on all ranks, window by window, for a file that an interrupted command resumes."""

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
    """Compute the missing rows of the output and append them, showing the progress; collective.

    All ranks must have created `output` before, and may read the file afterwards.

    Args:
        total: number of rows of the complete output.
        size: rows of a window, which are computed and written together.
        lines: makes the output lines of a slice of the rows; it is called on all ranks.
        what: label of the progress bar.
    """
    is_rank0, group = dist.get_rank() == 0, runtime.control_group()
    dist.barrier(group)  # all ranks have read the old output
    if is_rank0:
        output.begin()
    with rows_progress(total, output.done, what=what, shown=is_rank0) as add:
        for start in range(output.done, total, size):
            window = slice(start, min(start + size, total))
            new_lines = lines(window)
            if is_rank0:
                output.append(new_lines)
            add(window.stop - start)
    dist.barrier(group)  # the output is complete
