"""Files and directories that are either complete or not there, and the JSON rows that survive a crash."""

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError

_INCOMPLETE = "incomplete"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): after a crash it holds either its old content or all of the new one."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def directory_made_whole(path: Path) -> Iterator[Path]:
    """Give a new directory to fill, which becomes `path` when the block succeeds; until then `path` is not touched.

    What a block that fails has written is removed, and so is what killed processes left of earlier attempts.

    Raises:
        ConfigError: `path` is not free: it exists and is no empty directory, or is a mount point, which cannot be
            replaced. Nothing is ever overwritten.
    """
    final = path.resolve()
    if final.is_mount():
        raise ConfigError(f"output directory '{path}' is a mount point; choose a new directory inside it")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"output directory '{path}' already exists and is not empty; choose another or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_incomplete(final.parent, glob.escape(final.name))
    with replacing(final) as incomplete:
        incomplete.mkdir()
        yield incomplete
        fsync_tree(incomplete)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a free name beside `path`; what the block makes there takes the place of `path` in one step.

    If the block fails it is removed, at Ctrl-C too: it may be as large as a model.
    """
    temporary = unused_name(path)
    try:
        yield temporary
        put_in_place(temporary, path)
    except BaseException:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
        raise


def unused_name(path: Path) -> Path:
    """A hidden name beside `path` that is never given twice.

    Writers that outlive a killed job for a moment can therefore not write into the files of its successor.
    """
    return path.with_name(f".{path.name}.{_INCOMPLETE}-{uuid.uuid4().hex}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file, link or directory to `path` and wait until the name is on the disk."""
    os.replace(temporary, path)
    fsync(path.parent)


def remove_incomplete(folder: Path, name: str) -> None:
    """Remove the directories that killed processes left unfinished; `name` is the final one, or a pattern of it."""
    for abandoned in folder.glob(f".{name}.{_INCOMPLETE}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # its writers may still be at it, for a moment


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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_lines(path: Path) -> list[bytes]:
    """The lines of a file without their newlines; what follows the last newline was torn when its writer died."""
    return path.read_bytes().split(b"\n")[:-1]


class NotAnObject(ValueError):
    """Text that is not one JSON object.

    Args:
        reason: the same words for the same defect, so that lines can be counted by it.
        detail: what is special about this text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        NotAnObject: the text is not JSON (or not UTF-8), is another JSON value, or has an object with a key twice, of
            which json.loads would silently take the last.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except NotAnObject:
        raise
    except ValueError as error:
        raise NotAnObject("not JSON", str(error)) from None
    if not isinstance(value, dict):
        raise NotAnObject("not a JSON object", type(value).__name__)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotAnObject(f"field {next(name for name in names if names.count(name) > 1)!r} occurs more than once")
    return found
