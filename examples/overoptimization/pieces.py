"""Runs pieces of work in processes of their own, several at a time; finished ones are not run again."""

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
"""File in the directory of a piece of work that has begun; it holds `Work.made_from`."""


@dataclass(frozen=True)
class Work:
    """A function that fills a directory, and resumes an interrupted attempt there."""

    directory: Path
    do: Callable[[], None]
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of the work that may change between two commands, as JSON."""

    @property
    def done(self) -> bool:
        return (self.directory / DONE).exists()

    @property
    def differs(self) -> str:
        """Return the recorded and the present inputs, as text, if they differ; else an empty text."""
        file = self.directory / MADE_FROM
        if not file.exists() and not self.done:
            return ""
        recorded, now = json.loads(file.read_text()) if file.exists() else {}, json.loads(json.dumps(self.made_from))
        if recorded == now:
            return ""
        return f"{self.directory}: was made from {json.dumps(recorded)}, it would be made from {json.dumps(now)} now\n"


def run_all(title: str, work: Sequence[Work], workers: int) -> None:
    """Run the pieces that are not done yet.

    Raises:
        SystemExit: a piece failed (the message names its log; pieces that had started are finished first), or a
            directory was made from other inputs.
    """
    if changed := "".join(piece.differs for piece in work):
        sys.exit(f"{changed}remove these directories to have them made anew, or choose another --output")
    # a fork needs no imports, but cannot use CUDA if an import has looked for a GPU
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
    """Run a piece, and end this process."""
    status = 1
    try:
        os.setpgid(0, 0)  # Ctrl-C is for the first process
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before the call above
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
        os._exit(status)  # without closing what this process inherited
