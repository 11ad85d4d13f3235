"""Files and directories that are either complete or absent, and files of JSON rows, whose last a crash may cut off."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_eppo.config import ConfigError

_INCOMPLETE = "incomplete"
_NO_ROOM = "free some space there, or choose another directory"
_NOT_ALLOWED = "give this user access to it, or choose another place"
_IN_THE_WAY = "a file is in the way; choose another name"
_ADVICE = {
    errno.ENOSPC: _NO_ROOM,
    errno.EDQUOT: _NO_ROOM,
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or choose a directory of another file system",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name",
}
_PROBE_BYTES = 1 << 16  # more than a full disk has left after a failed write


def disk_trouble(error: OSError, directory: Path | None) -> str | None:
    """Return a sentence that says which file or directory cannot be written, why, and what to do.

    Args:
        directory: named if the error names no file, as after a `write` to a full disk.

    Returns:
        None for other kinds of errors.
    """
    advice = _ADVICE.get(error.errno or 0)
    where = error.filename or directory
    return f"{where}: {os.strerror(error.errno)}; {advice}" if error.errno and advice and where else None


@contextmanager
def disk_errors_name(path: Path) -> Iterator[None]:
    """Turn disk errors in a `with` block that writes `path`, or files below it, into OSErrors that name `path`.

    The error of a full disk names no file; those of torch and safetensors are no OSErrors, and have the system's error
    number in their text or not at all: then a few bytes are written beside `path` to get it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None or f".{_INCOMPLETE}-" in str(error.filename):
            error.filename = str(path)
        raise
    except BaseException as error:  # torch's CheckpointException does not derive from Exception
        number = _system_error(error, path.parent)
        if number in _ADVICE:
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _system_error(error: BaseException, directory: Path) -> int:
    """Return the error number of a failed write into `directory`; 0 if there is none."""
    if match := re.search(r"(?:Errno|os error) (\d+)", str(error)):
        return int(match[1])
    try:
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(bytes(_PROBE_BYTES))
    except OSError as probe_error:
        return probe_error.errno or 0
    return 0


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): after a crash it holds either its old content or all of the new one."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, as `write_atomically` does; ValueError if a number is NaN or infinite."""
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def directory_made_whole(path: Path) -> Iterator[Path]:
    """Give a new directory to fill, which becomes `path` when the block succeeds; until then `path` is not touched.

    If the block fails, its files are removed, new parent directories included. Incomplete directories of earlier,
    killed processes are removed as well.

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
        with suppress(OSError):  # not empty: another process has written there
            for parent in new:
                parent.rmdir()
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a free name beside `path`; the file or directory that the block makes there replaces `path` atomically.

    If the block fails, also by Ctrl-C, that is removed: it may be as large as a model.
    """
    temporary = unused_name(path)
    try:
        with disk_errors_name(path):
            yield temporary
            put_in_place(temporary, path)
    except BaseException:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary)
        elif os.path.lexists(temporary):
            temporary.unlink()
        raise


def unused_name(path: Path) -> Path:
    """Return a hidden name beside `path`, never the same twice: writers that outlive a killed job for a moment cannot
    write into the files of its successor."""
    return path.with_name(f".{path.name}.{_INCOMPLETE}-{uuid.uuid4().hex}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file, link or directory to `path` and wait until the name is on the disk."""
    os.replace(temporary, path)
    fsync(path.parent)


def remove_directory(directory: Path) -> None:
    """Remove a directory, after renaming it: a process that is killed meanwhile leaves no half of it under its name,
    only one that `remove_incomplete` finds."""
    aside = unused_name(directory)
    directory.rename(aside)
    shutil.rmtree(aside)


def remove_incomplete(folder: Path, name: str) -> None:
    """Remove directories that killed processes left incomplete; `name` is their final name, or a glob pattern of it."""
    for abandoned in folder.glob(f".{name}.{_INCOMPLETE}-*"):
        shutil.rmtree(abandoned, ignore_errors=True)  # processes may still write into it for a moment


def fsync_tree(directory: Path) -> None:
    """Wait until every file and name below `directory` is on the disk."""
    for path in (*directory.rglob("*"), directory):
        fsync(path)


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(directory: Path, name: str, source: Path, *others: Path) -> Path:
    """Return the path of the file `name` of a directory.

    Raises:
        ConfigError: the path, or the target of a link there, is neither in `directory` nor in one of the `others`; the
            message says that it is named in the file `source`.
    """
    path = directory / name
    if not any(path.resolve().is_relative_to(root.resolve()) for root in (directory, *others)):
        raise ConfigError(f"{source} names {name!r}, which lies, or links to a file, outside {directory}: refused")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def complete_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file, without newlines; an incomplete last line is dropped."""
    return path.read_bytes().split(b"\n")[:-1]


def json_line(row: Mapping[str, Any]) -> str:
    """Return one line of a JSON-lines file, its newline included."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def json_row(line: bytes, where: str) -> dict[str, Any]:
    """Read one line of a JSON-lines file, see `json_object`; ConfigError, which begins with `where`, if it is bad."""
    try:
        return json_object(line)
    except NotAnObject as error:
        raise ConfigError(f"{where}: {error}") from None


class NotAnObject(ValueError):
    """Text that is not one JSON object.

    Args:
        reason: the kind of defect, in the same words for every text, so that texts can be counted by it.
        detail: details about this text.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        NotAnObject: the text is not JSON (or not UTF-8, or has NaN or Infinity, which Python writes and reads), is
            another JSON value, is nested deeper than Python can read, or has the same key twice in an object
            (json.loads would silently take the last).
    """
    try:
        # json.loads itself would accept encoded surrogates in bytes, which are not UTF-8
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(decoded, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except NotAnObject:
        raise
    except ValueError as error:
        raise NotAnObject("not JSON", str(error)) from None
    except RecursionError:
        raise NotAnObject("nested too deep") from None
    if not isinstance(value, dict):
        raise NotAnObject("not a JSON object", type(value).__name__)
    return value


def _refuse_constant(name: str) -> None:
    raise NotAnObject("not JSON", f"{name} is not a number in JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise NotAnObject(f"field {next(name for name in names if names.count(name) > 1)!r} occurs more than once")
    return value
