"""Files and directories that are either complete or absent, and JSON rows of which a crash tears only the last."""

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

    If the block fails, what it has written is removed, new parent directories included; what killed processes left
    behind earlier is removed as well.

    Raises:
        ConfigError: `path` exists and is not an empty directory, or it is a mount point, which cannot be replaced.
            Nothing is ever overwritten.
    """
    final = path.resolve()
    if final.is_mount():
        raise ConfigError(f"output directory '{path}' is a mount point; choose a new directory inside it")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"output directory '{path}' already exists and is not empty; choose another or remove it")
    new = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_incomplete(final.parent, glob.escape(final.name))
    try:
        with replacing(final) as incomplete:
            incomplete.mkdir()
            yield incomplete
            fsync_tree(incomplete)
    except BaseException:
        with suppress(OSError):  # another process has written there
            for parent in new:
                parent.rmdir()
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a free name beside `path`; what the block writes there replaces `path` at once.

    If the block fails, also by Ctrl-C, it is removed: it may be as large as a model.
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
    """Return a hidden name beside `path` that is never given twice.

    So writers that outlive a killed job for a moment cannot write into the files of its successor.
    """
    return path.with_name(f".{path.name}.{_INCOMPLETE}-{uuid.uuid4().hex}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file, link or directory to `path` and wait until the name is on the disk."""
    os.replace(temporary, path)
    fsync(path.parent)


def remove_incomplete(folder: Path, name: str) -> None:
    """Remove directories that killed processes left incomplete; `name` is their final name, or a glob pattern of it."""
    for abandoned in folder.glob(f".{name}.{_INCOMPLETE}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # processes may still write into it for a moment


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
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file, without newlines; what follows the last newline is dropped as torn."""
    return path.read_bytes().split(b"\n")[:-1]


class NotAnObject(ValueError):
    """Text that is not one JSON object.

    Args:
        reason: the kind of defect, in the same words for every text, so that texts can be counted by it.
        detail: what is wrong with this text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        NotAnObject: the text is not JSON (or not UTF-8), is another JSON value, or has the same key twice in an object
            (json.loads would silently take the last).
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
