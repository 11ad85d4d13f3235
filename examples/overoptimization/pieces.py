"""Pieces of work in processes of their own, as many at a time as are asked for; what is finished is not done again."""

import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_eppo.files import write_json
from nemo_eppo.machine import visible_gpus
from nemo_eppo.observability.run import hold
from nemo_eppo.processes import end_with_parent

DONE = "done"
"""File in the directory of a piece of work that is finished; it holds its seconds."""
MADE_FROM = "made_from.json"
"""File in the directory of a piece of work that has begun; it holds what that was made from."""


@dataclass(frozen=True)
class Work:
    """Something that fills a directory, and goes on with what an interrupted attempt left there."""

    directory: Path
    do: Callable[[], None]
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """What it depends on that may change between two commands, as JSON has it."""

    @property
    def done(self) -> bool:
        return (self.directory / DONE).exists()

    @property
    def differs(self) -> str:
        """Say what its directory was made from, if that is not what it would be made from; else an empty text."""
        file = self.directory / MADE_FROM
        if not file.exists() and not self.done:
            return ""
        found, wanted = json.loads(file.read_text()) if file.exists() else {}, json.loads(json.dumps(self.made_from))
        if found == wanted:
            return ""
        return f"{self.directory}: was made from {json.dumps(found)}, it would be made from {json.dumps(wanted)} now\n"


def run_all(title: str, work: Sequence[Work], workers: int) -> None:
    """Do what is not done yet.

    Raises:
        SystemExit: a piece failed; its log is named. Those that had started are finished first. Or a directory holds,
            finished or begun, what was made from something else.
    """
    if changed := "".join(piece.differs for piece in work):
        sys.exit(f"{changed}remove these directories to have them made anew, or choose another --output")
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
        write_json(piece.directory / MADE_FROM, piece.made_from)
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
