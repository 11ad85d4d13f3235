"""Pieces of work in processes of their own, as many at a time as are asked for; what is finished is not done again."""

import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_eppo.launch.gpus import visible_gpus
from nemo_eppo.observability.run import hold
from nemo_eppo.processes import end_with_parent

DONE = "done"
"""File in the directory of a piece of work that is finished; it holds its seconds."""


@dataclass(frozen=True)
class Work:
    """Something that fills a directory, and goes on with what an interrupted attempt left there."""

    directory: Path
    do: Callable[[], None]

    @property
    def done(self) -> bool:
        return (self.directory / DONE).exists()


def run_all(title: str, work: Sequence[Work], workers: int) -> None:
    """Do what is not done yet.

    Raises:
        SystemExit: a piece failed; its log is named. Those that had started are finished first.
    """
    # a fork has everything imported already, but cannot use CUDA if an import asked whether there is a GPU
    context = multiprocessing.get_context("spawn" if visible_gpus() else "fork")
    waiting = [piece for piece in work if not piece.done]
    running: dict[Any, tuple[multiprocessing.process.BaseProcess, Work]] = {}
    failed: list[Work] = []
    with tqdm(total=len(work), initial=len(work) - len(waiting), desc=title, unit="run") as bar:
        while running or (waiting and not failed):
            while waiting and not failed and len(running) < workers:
                piece = waiting.pop(0)
                process = context.Process(target=_do, args=(piece, os.getpid()))  # type: ignore[attr-defined]
                process.start()
                running[process.sentinel] = process, piece
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, piece = running.pop(sentinel)
                process.join()
                bar.update()
                if process.exitcode:
                    failed.append(piece)
    if failed:
        sys.exit("".join(f"{piece.directory} failed: see {piece.directory / 'output.txt'}\n" for piece in failed))


def _do(piece: Work, parent: int) -> None:
    """Do a piece in this process, which ends with it."""
    status = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the first process
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before that was asked for
            os._exit(1)
        hold(piece.directory)
        output = os.open(piece.directory / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        started = time.monotonic()
        piece.do()
        (piece.directory / DONE).write_text(f"{time.monotonic() - started:.1f}\n")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # nothing that this process inherited is closed twice
