"""Files and directories that are either complete or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): after a crash it holds either its old content or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync(path.parent)  # the rename itself


@contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Remove a directory that the block fails to fill, at Ctrl-C too: it may be as large as a model."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory)
        raise


def fsync_tree(directory: Path) -> None:
    """Wait until every file below `directory`, and their names, are on the disk."""
    for path in (*directory.rglob("*"), directory):
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
