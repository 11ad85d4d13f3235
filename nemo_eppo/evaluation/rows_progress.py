"""Shows how many rows of a command are done: a bar on a terminal, elsewhere a log line every half minute."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from nemo_eppo.observability.progress import clock

logger = logging.getLogger(__name__)
_EVERY_S = 30.0  # seconds from one line of the log to the next


@contextmanager
def rows_progress(
    total: int, done: int = 0, unit: str = "row", what: str = "", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Show the progress on standard error during a `with` block, which is given a function that adds finished rows.

    Args:
        done: number of rows of an interrupted run.
        what: label of the bar.
        shown: whether to show anything; True on rank 0 only.
    """
    start, ended = time.perf_counter(), threading.Event()

    def log() -> None:
        while not ended.wait(_EVERY_S):
            since = clock(time.perf_counter() - start)
            logger.info(
                "%s%d of %d %ss are done, %s since the start", f"{what}: " if what else "", done, total, unit, since
            )

    def add(number: int) -> None:
        nonlocal done
        done += number
        bar.update(number)

    # None: tqdm itself disables the bar when stderr is not a terminal
    with tqdm(total=total, initial=done, unit=unit, desc=what or None, disable=None if shown else True) as bar:
        logs = threading.Thread(target=log, name="progress", daemon=True) if shown and bar.disable else None
        if logs is not None:
            logs.start()
        try:
            yield add
        finally:
            ended.set()
            if logs is not None:
                logs.join()
